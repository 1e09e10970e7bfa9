// SPDX-License-Identifier: Apache-2.0
    .section .rodata
    .balign 64
    .globl minivmm_probe_elf_begin, minivmm_probe_elf_end
minivmm_probe_elf_begin:
    .incbin MINIVMM_PROBE_ELF
minivmm_probe_elf_end:
    .section .note.GNU-stack, "", @progbits
