/* What the kernels of the package share. They are called through ctypes (native.py), once per chunk, and compile with gcc and
 * clang. Each has a portable variant and one for AVX2, which is chosen at run time. */
#ifndef CAKE_NATIVE_H
#define CAKE_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The encoded bytes are those of a little-endian machine."
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,popcnt")))
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { ABI = 2 };  /* of all functions; native.py expects it */
enum { OK, BAD_SIZES, BAD_TABLE, BAD_ESCAPES, NO_MEMORY, BAD_SCALES };  /* native.py names them */
enum { AUTOMATIC, PORTABLE, VECTOR };                                  /* variants */

static const int64_t MOST_CHANNELS = 1 << 20, MOST_BYTES = (int64_t)1 << 40;

INLINE int has_vectors(int variant) {
#ifdef AVX2
  return variant != PORTABLE && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
#else
  (void)variant;
  return 0;
#endif
}

#ifdef AVX2
#define CHOOSE(variant, kernel) (has_vectors(variant) ? kernel##_avx2 : kernel##_portable)
#else
#define CHOOSE(variant, kernel) ((void)(variant), kernel##_portable)
#endif

#endif
