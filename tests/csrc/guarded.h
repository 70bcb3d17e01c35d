/* Memory for operands that ends, or begins, exactly at a page that may not be touched. */
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* With `heap`, buffers come from malloc, whose ends AddressSanitizer and valgrind watch; on Windows always. */
#ifdef _WIN32
static int heap = 1;
#else
#include <sys/mman.h>
static int heap;
#endif

typedef struct {
  char *base, *data; /* the writable pages, between two protected ones */
  size_t capacity, bytes;
  int at_end;
} Guarded;

enum { kCanary = 128 }; /* bytes beside the buffer, on the side without a protected page, that must not change */

static void* begin_buffer(Guarded* buffer, size_t bytes, int at_end) {
  buffer->bytes = bytes, buffer->at_end = at_end;
  if (heap) return buffer->data = malloc(bytes);
#ifndef _WIN32
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), needed = (bytes + kCanary + page - 1) / page * page;
  if (buffer->capacity < needed) {
    if (buffer->base) munmap(buffer->base - page, buffer->capacity + 2 * page);
    char* all = mmap(NULL, needed + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + page, needed, PROT_READ | PROT_WRITE)) abort();
    buffer->base = all + page, buffer->capacity = needed;
  }
  buffer->data = at_end ? buffer->base + buffer->capacity - bytes : buffer->base;
  memset(at_end ? buffer->data - kCanary : buffer->data + bytes, 0xA5, kCanary);
#endif
  return buffer->data;
}

/* Makes an operand read-only for a call, or writable again. */
static void allow_writes(const Guarded* buffer, int allowed) {
#ifndef _WIN32
  if (!heap && buffer->base) mprotect(buffer->base, buffer->capacity, allowed ? PROT_READ | PROT_WRITE : PROT_READ);
#endif
}

/* Whether the bytes beside the buffer are unchanged; frees it in heap mode. */
static int end_buffer(Guarded* buffer) {
  if (heap) {
    free(buffer->data);
    return 1;
  }
  const unsigned char* beside = (const unsigned char*)(buffer->at_end ? buffer->data - kCanary : buffer->data + buffer->bytes);
  for (int i = 0; i < kCanary; ++i)
    if (beside[i] != 0xA5) return 0;
  return 1;
}
