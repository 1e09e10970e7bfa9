# SPDX-License-Identifier: Apache-2.0
# The one place that says how our targets are compiled.

add_library(minivmm_flags INTERFACE)
target_include_directories(minivmm_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(minivmm_flags INTERFACE
  -Wall -Wextra -Wshadow -Wconversion -fstack-clash-protection -fno-omit-frame-pointer)
if(MINIVMM_SANITIZE)
  target_compile_options(minivmm_flags INTERFACE -fsanitize=${MINIVMM_SANITIZE}
                         -fno-sanitize-recover=all)
  target_link_options(minivmm_flags INTERFACE -fsanitize=${MINIVMM_SANITIZE})
  if(MINIVMM_SANITIZE MATCHES thread AND CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    # g++ warns that TSan does not model std::atomic_thread_fence.
    target_compile_options(minivmm_flags INTERFACE -Wno-tsan)
  endif()
  if(MINIVMM_FUZZ)
    target_compile_options(minivmm_flags INTERFACE -fsanitize=fuzzer-no-link)
    target_link_options(minivmm_flags INTERFACE -fsanitize=fuzzer-no-link)
  endif()
endif()

# minivmm_precompile(TARGET [header...]): what nearly every file includes, and more, parsed once a
# target. Builds without it show missing includes.
function(minivmm_precompile name)
  if(NOT MINIVMM_PCH)
    return()
  endif()
  foreach(header algorithm array atomic chrono functional memory mutex optional span string thread
                 vector fmt/core.h ${ARGN})
    target_precompile_headers(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:<${header}$<ANGLE-R>>")
  endforeach()
endfunction()

# minivmm_precompile_like(TARGET OTHER): takes the headers that OTHER has parsed; both must be
# compiled with the same flags.
function(minivmm_precompile_like name other)
  if(MINIVMM_PCH)
    target_precompile_headers(${name} REUSE_FROM ${other})
  endif()
endfunction()

# minivmm_library(NAME SOURCES a.cc... [DEPENDS targets...] [PRECOMPILE headers...]): a static
# library of one layer. One that names no headers of its own shares those that minivmm_base parses.
# Code that may run on a fiber has a small stack: a frame over 4 KiB is an error.
function(minivmm_library name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPENDS;PRECOMPILE" ${ARGN})
  add_library(${name} STATIC ${arg_SOURCES})
  target_link_libraries(${name} PUBLIC minivmm_flags ${arg_DEPENDS})
  if(arg_PRECOMPILE OR name STREQUAL minivmm_base)
    minivmm_precompile(${name} ${arg_PRECOMPILE})
  else()
    minivmm_precompile_like(${name} minivmm_base)
  endif()
  if(NOT MINIVMM_SANITIZE)
    target_compile_options(${name} PRIVATE -Wframe-larger-than=4096)
  endif()
endfunction()
