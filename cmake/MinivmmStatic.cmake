# SPDX-License-Identifier: Apache-2.0
# Libraries become a part of the program where the system has them as archives
# (MINIVMM_STATIC_LIBRARIES): the dynamic loader's work was a third of a guest's start. The C library
# stays shared, because GnuTLS, libnbd and librbd are loaded when they are needed.

# minivmm_archive_of(OUT, FILE): the archive beside the shared library FILE, or FILE.
function(minivmm_archive_of out file)
  # libz.so lies beside libz.a, libboost_context.so.1.74.0 beside libboost_context.a.
  string(REGEX REPLACE "\\.so(\\.[0-9]+)*$" ".a" archive "${file}")
  if(IS_ABSOLUTE "${file}" AND EXISTS "${archive}")
    set(file "${archive}")
  endif()
  set(${out} "${file}" PARENT_SCOPE)
endfunction()

# minivmm_use_archives(TARGET...): imported targets, of find_package or of pkg-config.
function(minivmm_use_archives)
  foreach(target ${ARGN})
    foreach(property IMPORTED_LOCATION IMPORTED_LOCATION_NONE IMPORTED_LOCATION_RELEASE
                     INTERFACE_LINK_LIBRARIES)
      get_target_property(values ${target} ${property})
      if(NOT values)
        continue()
      endif()
      set(changed)
      foreach(value ${values})
        minivmm_archive_of(archive "${value}")
        list(APPEND changed "${archive}")
      endforeach()
      set_property(TARGET ${target} PROPERTY ${property} ${changed})
    endforeach()
  endforeach()
endfunction()

# Debian has no archive of fmt; its headers hold all of it.
function(minivmm_static_fmt)
  set(source ${PROJECT_SOURCE_DIR}/cmake/static_fmt.cc)
  file(WRITE ${PROJECT_BINARY_DIR}/static_fmt_main.cc
       "#include <fmt/format.h>\n#include <fmt/chrono.h>\n#include <locale>\n"
       "int main(int n, char**) {\n"
       "  fmt::print(stderr, fmt::runtime(\"{:>8} {:x} {}\\n\"), 1.5, n, \"text\");\n"
       "  return fmt::format(std::locale(), \"{:L} {}\", 1000, 0.1F).empty() ? 1 : 0;\n}\n")
  get_target_property(headers fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
  if(NOT DEFINED MINIVMM_STATIC_FMT_WORKS)
    try_compile(MINIVMM_STATIC_FMT_WORKS ${PROJECT_BINARY_DIR}/static_fmt
      SOURCES ${source} ${PROJECT_BINARY_DIR}/static_fmt_main.cc
      CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${headers}"
      CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON)
  endif()
  if(MINIVMM_STATIC_FMT_WORKS)
    add_library(minivmm_fmt STATIC ${source})
    target_include_directories(minivmm_fmt SYSTEM PUBLIC ${headers})
    target_compile_definitions(minivmm_fmt INTERFACE
      $<TARGET_PROPERTY:fmt::fmt,INTERFACE_COMPILE_DEFINITIONS>)
  endif()
endfunction()

# minivmm_static_runtime(PROGRAM): the C++ runtime too. A library that is loaded later and brings its
# own must not be given ours: nothing of the archives is exported.
function(minivmm_static_runtime program)
  target_link_options(${program} PRIVATE -static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL
                      -Wl,--gc-sections -Wl,--as-needed)
endfunction()
