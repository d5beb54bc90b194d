# From the processor's first instruction to 64 bits, with the vector and tile registers on; then the program's system calls and exceptions.
# Bochs has this file at 32 MiB (`optramimage`), and its first section at the end of the ROM.
.section .rom, "ax"
.code16
# Bochs begins here, at the end of the ROM, 16 bytes below 4 GiB.
rom:
    cli
    lgdtl %cs:(gdt_pointer - rom + 0xff00)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $0x08, $start32
gdt_pointer:
    .word 5 * 8 - 1
    .long gdt
    .org 0xf0
    jmp rom
    .org 0x100

.section .text.start, "ax"
.code32
.globl start32
start32:
    mov $0x10, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    # Bochs has read the image into blocks of 128 KiB in a row, and gives a block an address when it is first used: use them in that order
    mov $0x2000000, %eax
2:  mov (%eax), %ebx
    add $0x20000, %eax
    cmp $image_end, %eax
    jb 2b
    mov $stack_end, %esp
    in $0x92, %al              # address line 20 is off after a reset
    or $2, %al
    and $0xfe, %al
    out %al, $0x92
    # 1 GiB, every address where it is
    movl $(tables + 0x1000 + 3), tables
    movl $(tables + 0x2000 + 3), tables + 0x1000
    mov $(tables + 0x2000), %edi
    mov $0x83, %eax
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    cmp $0x40000083, %eax
    jne 1b
    mov $tables, %eax
    mov %eax, %cr3
    mov $0x00040620, %eax      # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    mov %eax, %cr4
    mov $0xc0000080, %ecx      # EFER: system calls, long mode
    rdmsr
    or $0x101, %eax
    wrmsr
    mov $0x80000033, %eax      # PG, NE, ET, MP, PE
    mov %eax, %cr0
    ljmp $0x18, $start64
.code64
start64:
    mov $0x20, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_end, %rsp
    xor %ecx, %ecx             # XCR0: x87, SSE, AVX, AVX-512, AMX
    xor %edx, %edx
    mov $0x600e7, %eax
    xsetbv
    fninit
    call load_program          # returns the program's stack
    mov %rax, %rsp
    xor %edx, %edx
    jmp *entry(%rip)

# A system call of the program, which runs with all rights: rcx is where it goes on, r11 its flags. It keeps all registers but these and rax.
.globl on_call
on_call:
    mov %rsp, program_stack(%rip)
    mov $stack_end, %rsp
    push %rcx
    push %r11
    push %rdi
    push %rsi
    push %rdx
    push %r10
    push %r8
    push %r9
    mov %rdx, %rcx             # serve(number, first, second, third)
    mov %rsi, %rdx
    mov %rdi, %rsi
    mov %rax, %rdi
    call serve
    pop %r9
    pop %r8
    pop %r10
    pop %rdx
    pop %rsi
    pop %rdi
    pop %r11
    pop %rcx
    push %r11
    popfq
    mov program_stack(%rip), %rsp
    jmp *%rcx

# An exception: its number, and above it what the processor pushed.
.macro EXCEPTION n
    .balign 16
    push $\n
    jmp on_exception
.endm
.balign 16
.globl exceptions
exceptions:
.altmacro
.set n, 0
.rept 32
    EXCEPTION %n
    .set n, n + 1
.endr
.noaltmacro
on_exception:
    mov %rsp, %rdi
    mov $stack_end, %rsp
    call fail

.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff, 0x00af92000000ffff
.globl image
.balign 16
image: .incbin "program"
.bss
.balign 4096
tables: .skip 0x3000
.skip 65536
stack_end:
program_stack: .skip 8
