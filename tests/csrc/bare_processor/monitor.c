// Loads one static Linux program on an emulated computer without a system, and answers the few system calls that it makes. What the program writes goes
// to Bochs' port 0xe9. ARGUMENTS: the program's name and arguments, as C strings.
#include <elf.h>
#include <stdint.h>

// Addresses: the program where it was linked (4 MiB), its heap behind it, this monitor at 32 MiB, the program's stack, what it maps.
enum { PROGRAM = 0x400000, HEAP_END = 0x1f00000, STACK = 0x7f00000, STACK_BYTES = 0x200000, MAPPED = 0x8000000, MAPPED_END = 0x1f000000, PAGE = 4096 };
enum { FS_BASE = 0xc0000100, STAR = 0xc0000081, LSTAR = 0xc0000082, FMASK = 0xc0000084 };

extern const unsigned char image[];  // the program's file
extern char exceptions[], on_call[];
uint64_t entry;
static uint64_t heap, mapped = MAPPED, idt[64];

static void out(uint16_t port, uint8_t byte) { __asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"(port)); }
static void clear(uint64_t at, uint64_t n) { __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(0) : "memory"); }
static void copy(uint64_t to, const void* from, uint64_t n) { __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory"); }
static void set_register(uint32_t name, uint64_t to) { __asm__ volatile("wrmsr" : : "c"(name), "a"((uint32_t)to), "d"((uint32_t)(to >> 32))); }
static uint64_t round_up(uint64_t n) { return (n + PAGE - 1) / PAGE * PAGE; }

static void say(const char* text) {
  while (*text) out(0xe9, *text++);
}
static void say_number(uint64_t n) {
  for (int i = 60; i >= 0; i -= 4) out(0xe9, "0123456789abcdef"[n >> i & 15]);
}
static void shut_down(void) {
  for (const char* s = "Shutdown"; *s; s++) out(0x8900, *s);
  for (;;) __asm__ volatile("hlt");
}

void fail(const uint64_t* pushed) {
  uint64_t address;
  __asm__ volatile("mov %%cr2, %0" : "=r"(address));
  say("exception ");
  for (int i = 0; i < 4; i++) say_number(pushed[i]), say(" ");
  say("address "), say_number(address), say("\n");
  shut_down();
}

static int64_t write_all(const char* from, uint64_t n) {
  for (uint64_t i = 0; i < n; i++) out(0xe9, from[i]);
  return n;
}
static int64_t map(uint64_t n) {
  const uint64_t at = mapped;
  if (n > MAPPED_END - mapped) return -12;  // ENOMEM
  mapped += round_up(n);
  clear(at, n);
  return at;
}

// The numbers are those of Linux on x86-64.
int64_t serve(uint64_t call, uint64_t a, uint64_t b, uint64_t c) {
  switch (call) {
    case 1: return write_all((const char*)b, c);           // write
    case 9: return a ? -12 : map(b);                       // mmap
    case 10: case 11: case 13: case 14: case 202: case 273: return 0;  // mprotect, munmap, signals, futex, robust list: nothing to do
    case 12:                                               // brk
      if (a > heap && a < HEAP_END) clear(heap, a - heap), heap = a;
      return heap;
    case 158:                                              // arch_prctl: the register of thread-local memory
      if (a != 0x1002) return -22;
      set_register(FS_BASE, b);
      return 0;
    case 39: case 186: case 218: return 1;                 // getpid, gettid, set_tid_address
    case 60: case 231:                                     // exit, exit_group
      say("exit status "), say_number(a), say("\n");
      shut_down();
  }
  return -38;  // ENOSYS
}

static void load_segments(const Elf64_Ehdr* head) {
  const Elf64_Phdr* part = (const void*)(image + head->e_phoff);
  clear(PROGRAM, HEAP_END - PROGRAM), clear(STACK - STACK_BYTES, STACK_BYTES + PAGE);
  for (int i = 0; i < head->e_phnum; i++) {
    if (part[i].p_type != PT_LOAD) continue;
    copy(part[i].p_vaddr, image + part[i].p_offset, part[i].p_filesz);
    if (part[i].p_vaddr + part[i].p_memsz > heap) heap = part[i].p_vaddr + part[i].p_memsz;
  }
  heap = round_up(heap), entry = head->e_entry;
}

// As the System V ABI has it: the arguments, no environment, what the C library wants to know.
static uint64_t* fill_stack(const Elf64_Ehdr* head) {
  static const char* const arguments[] = {ARGUMENTS};
  const int count = sizeof arguments / sizeof *arguments;
  const uint64_t facts[] = {AT_PHDR, PROGRAM + head->e_phoff, AT_PHNUM, head->e_phnum, AT_PHENT, head->e_phentsize, AT_PAGESZ, PAGE,
                            AT_RANDOM, (uint64_t)image, AT_ENTRY, entry, AT_SECURE, 0, AT_NULL, 0};
  uint64_t *stack = (uint64_t*)STACK, *at = stack;
  *at++ = count;
  for (int i = 0; i < count; i++) *at++ = (uint64_t)arguments[i];
  at += 2;
  for (unsigned i = 0; i < sizeof facts / sizeof *facts; i++) *at++ = facts[i];
  return stack;
}

uint64_t* load_program(void) {
  for (int i = 0; i < 32; i++) {
    const uint64_t at = (uint64_t)exceptions + 16 * i;
    idt[2 * i] = (at & 0xffff) | 0x18ull << 16 | 0x8e00ull << 32 | (at >> 16 & 0xffff) << 48;
    idt[2 * i + 1] = at >> 32;
  }
  const struct { uint16_t size; uint64_t at; } __attribute__((packed)) table = {sizeof idt - 1, (uint64_t)idt};
  __asm__ volatile("lidt %0" : : "m"(table));
  set_register(STAR, 0x18ull << 32), set_register(LSTAR, (uint64_t)on_call), set_register(FMASK, 0x200);
  const Elf64_Ehdr* head = (const void*)image;
  load_segments(head);
  return fill_stack(head);
}
