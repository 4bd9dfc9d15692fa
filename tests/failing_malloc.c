/* Preloaded in the place of malloc: one allocation of a call fails, as if memory had run out there. */
#include <errno.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void* PyObject_CallNoArgs(void*);

static __thread long left = -1; /* allocations until the one that fails; negative: none does */

static int fails(void) {
  if (left < 0) return 0;
  if (left-- > 0) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t bytes) { return fails() ? NULL : __libc_malloc(bytes); }
void* calloc(size_t n, size_t bytes) { return fails() ? NULL : __libc_calloc(n, bytes); }
void* realloc(void* old, size_t bytes) { return fails() ? NULL : __libc_realloc(old, bytes); }
void* memalign(size_t to, size_t bytes) { return fails() ? NULL : __libc_memalign(to, bytes); }
void* aligned_alloc(size_t to, size_t bytes) { return memalign(to, bytes); }
int posix_memalign(void** out, size_t to, size_t bytes) {
  void* const made = memalign(to, bytes);
  if (!made) return ENOMEM;
  *out = made;
  return 0;
}

/* Call `function()` with its allocation number `k` failing. Whether it came to that: *failed. */
void* call_with_failure(void* function, long k, int* failed) {
  left = k;
  void* const result = PyObject_CallNoArgs(function);
  *failed = left < 0;
  left = -1;
  return result;
}
