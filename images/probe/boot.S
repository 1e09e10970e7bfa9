// SPDX-License-Identifier: Apache-2.0
// The privileged part of the probe guest. Everything else runs at CPL 3: on hosts whose KVM has no
// hardware virtualization, CPL 0 code is interpreted at under two million instructions a second,
// while CPL 3 code runs natively. So this file is kept to what only CPL 0 can do, in few
// instructions: entry, interrupt handlers, and a gate for port I/O, MSRs and hlt.
//
// The gate is a ud2 at a known address: exceptions enter CPL 0 on every kind of host, while
// `syscall` and `int` do not. Program and gate trust each other; privilege here is about speed,
// not protection, so all pages are user pages.

#define KERNEL_CS 0x10
#define KERNEL_DS 0x18
#define USER_DS 0x2b
#define USER_CS 0x33
#define TSS_SELECTOR 0x38

#define COM1 0x3f8
#define LAPIC_EOI 0xfee000b0

    .section .note.Xen, "a", @note
    .balign 4
    .long 4                     // name size
    .long 8                     // descriptor size: QEMU reads eight bytes
    .long 18                    // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot.text, "ax", @progbits
    .code32
    .globl pvh_entry
// 32-bit protected mode, paging off, ebx = start_info.
pvh_entry:
    cld
    cli
    lgdt gdt_pointer
    movl $0x20, %eax            // CR4.PAE
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      // EFER
    xorl %edx, %edx
    movl $0x100, %eax           // LME
    wrmsr
    movl $0x80000033, %eax      // PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $KERNEL_CS, $long_mode

    .code64
long_mode:
    movl $KERNEL_DS, %eax
    movl %eax, %ss
    movl $USER_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl $kernel_stack_top, %esp
    lidt idt_pointer
    // The TSS lies below 4 GiB; its descriptor wants the address in pieces.
    movl $tss, %eax
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb %ah, gdt_tss + 7
    movl $TSS_SELECTOR, %eax
    ltr %ax
    // Firmware may have left the old interrupt controller on.
    movb $0xff, %al
    outb %al, $0xa1
    outb %al, $0x21
    movl %ebx, %edi
    pushq $USER_DS
    pushq $user_stack_top - 8   // as after a call
    pushq $0x2                  // interrupts stay off until the program asks
    pushq $USER_CS
    pushq $probe_main
    iretq

// uint64_t gate_call(op, a, b): rdi, rsi, rdx; returns rax.
    .text
    .globl gate_call
gate_call:
gate_ud2:
    ud2
    ret

    .globl gate_entry
// #UD handler. Handlers below may use rax, rcx, rdx, rsi, rdi, r8: a call clobbers them anyway.
gate_entry:
    cmpq $gate_ud2, (%rsp)
    jne not_gate
    addq $2, (%rsp)
    jmp *gate_table(,%rdi,8)
not_gate:
    pushq $0
    pushq $6
    jmp fault_common

    .section .rodata
    .balign 8
gate_table:
    .quad op_write, op_wait, op_rdmsr, op_wrmsr, op_cpuid, op_out8, op_in8, op_enable, op_exit

    .text
// rsi = bytes, rdx = count. In bursts of what the transmit FIFO takes, so that one wait serves 16.
op_write:
    movq %rdx, %r8
1:  testq %r8, %r8
    jz 3f
    movl $(COM1 + 5), %edx
2:  inb %dx, %al
    testb $0x20, %al
    jz 2b
    movl $16, %ecx
    cmpq %rcx, %r8
    jae 4f
    movq %r8, %rcx
4:  subq %rcx, %r8
    movl $COM1, %edx
    rep outsb
    jmp 1b
3:  iretq

// Sleeps until an interrupt, unless *(uint32_t*)rsi != edx already. Interrupts are off here, so
// none can slip in between the look and the hlt.
op_wait:
    cmpl %edx, (%rsi)
    jne 1f
    sti
    hlt
    cli
1:  iretq

op_rdmsr:
    movl %esi, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    iretq

op_wrmsr:
    movl %esi, %ecx
    movl %edx, %eax
    shrq $32, %rdx
    wrmsr
    iretq

// rsi = {eax, ebx, ecx, edx}, in and out.
op_cpuid:
    pushq %rbx
    movl (%rsi), %eax
    movl 8(%rsi), %ecx
    cpuid
    movl %eax, (%rsi)
    movl %ebx, 4(%rsi)
    movl %ecx, 8(%rsi)
    movl %edx, 12(%rsi)
    popq %rbx
    iretq

op_out8:
    movl %edx, %eax
    movl %esi, %edx
    outb %al, %dx
    iretq

op_in8:
    movl %esi, %edx
    xorl %eax, %eax
    inb %dx, %al
    iretq

// Interrupts on in the program.
op_enable:
    orq $0x200, 16(%rsp)
    iretq

    .globl machine_exit
// esi = status. QEMU's isa-debug-exit and minivmm's exit port first; a machine that has neither
// gets a reset by the keyboard controller.
machine_exit:
op_exit:
    movl %esi, %eax
    movl $0xf4, %edx
    outl %eax, %dx
    movb $0xfe, %al
    outb %al, $0x64
1:  cli
    hlt
    jmp 1b

// Exceptions: no way back. Some push an error code; the others get a zero.
    .macro fault vector, has_code
fault_\vector:
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\vector
    jmp fault_common
    .endm

    .irp v, 0,1,2,3,4,5,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
    fault \v, 0
    .endr
    .irp v, 8,10,11,12,13,14,17,21,29,30
    fault \v, 1
    .endr

fault_common:
    cld
    movq %rsp, %rdi             // {vector, code, rip, cs, rflags, rsp, ss}
    movq %cr2, %rsi
    andq $-16, %rsp
    call probe_fault
    movl $99, %esi
    jmp machine_exit

    .globl fault_stubs
    .section .rodata
    .balign 8
fault_stubs:
    .quad fault_0, fault_1, fault_2, fault_3, fault_4, fault_5, gate_entry, fault_7
    .quad fault_8, fault_9, fault_10, fault_11, fault_12, fault_13, fault_14, fault_15
    .quad fault_16, fault_17, fault_18, fault_19, fault_20, fault_21, fault_22, fault_23
    .quad fault_24, fault_25, fault_26, fault_27, fault_28, fault_29, fault_30, fault_31

// Device interrupts: read the cause, acknowledge it, count.
    .text
    .balign 16
    .globl irq_stubs
irq_stubs:
    .set n, 0
    .rept 32
    pushq %rax
    movl $n, %eax
    jmp irq_common
    .balign 16
    .set n, n + 1
    .endr

irq_common:
    pushq %rdx
    pushq %rcx
    movq irq_base(,%rax,8), %rdx
    movl 0x60(%rdx), %ecx       // InterruptStatus
    testl %ecx, %ecx
    jz 1f
    movl %ecx, 0x64(%rdx)       // InterruptACK
    orl %ecx, irq_status(,%rax,4)
1:  incl irq_count(,%rax,4)
    movl $LAPIC_EOI, %edx
    movl $0, (%rdx)
    popq %rcx
    popq %rdx
    popq %rax
    iretq

    .globl serial_stub
// Takes what has been typed into a ring; the program is its only reader.
serial_stub:
    pushq %rax
    pushq %rdx
    pushq %rcx
1:  movl $(COM1 + 5), %edx
    inb %dx, %al
    testb $1, %al
    jz 2f
    movl $COM1, %edx
    inb %dx, %al
    movl serial_received, %ecx
    andl $4095, %ecx
    movb %al, serial_ring(%rcx)
    incl serial_received
    jmp 1b
2:  movl $LAPIC_EOI, %edx
    movl $0, (%rdx)
    popq %rcx
    popq %rdx
    popq %rax
    iretq

    .globl timer_stub
timer_stub:
    pushq %rdx
    incl timer_count
    movl $LAPIC_EOI, %edx
    movl $0, (%rdx)
    popq %rdx
    iretq

    .globl spurious_stub
spurious_stub:
    iretq

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff    // 0x10 kernel code
    .quad 0x00cf93000000ffff    // 0x18 kernel data
    .quad 0
    .quad 0x00cff3000000ffff    // 0x28 user data
    .quad 0x00affb000000ffff    // 0x30 user code
gdt_tss:
    .word 0x67, 0, 0x8900, 0    // 0x38, base filled in
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

    .balign 16
tss:
    .long 0
    .quad kernel_stack_top      // RSP0
    .fill 88, 1, 0
    .word 0, 104                // no I/O permission map

// Identity map of the first 4 GiB, ready made so that no instruction is spent on it.
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad page_directories + 7
    .quad page_directories + 0x1007
    .quad page_directories + 0x2007
    .quad page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 2048
    .quad page + 0x87
    .set page, page + 0x200000
    .endr

    .bss
    .balign 4096
    .globl idt
idt:
    .skip 4096
    .skip 16384
kernel_stack_top:
    .skip 65536
user_stack_top:
    .globl irq_base, irq_count, irq_status, serial_ring, serial_received, timer_count
irq_base:
    .skip 32 * 8
irq_count:
    .skip 32 * 4
irq_status:
    .skip 32 * 4
serial_received:
    .skip 4
timer_count:
    .skip 4
serial_ring:
    .skip 4096

    .section .note.GNU-stack, "", @progbits
