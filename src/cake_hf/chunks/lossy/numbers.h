/* Numbers of KV as float32 and back, float16 scales and packed codes: numbers.py and scales.py in C, to the bit. Each operation on
 * numbers is one of float32, rounded to the nearest, so these files must be compiled without contraction to fused operations. No
 * subnormal float32 comes up, as a thread may flush these to zero.
 */
#ifndef CAKE_NUMBERS_H
#define CAKE_NUMBERS_H

#include "native.h"

enum { WHOLE, BFLOAT16, FLOAT16, FLOAT32 };  /* dtypes; a WHOLE piece is stored as it is */

typedef uint16_t __attribute__((aligned(1), may_alias)) Word;
typedef uint32_t __attribute__((aligned(1), may_alias)) Long;

INLINE float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

INLINE uint32_t bits_of(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return bits;
}

INLINE float power_of_two(int exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

/* A finite float16 as float32. */
INLINE float from_half(uint32_t half) {
  uint32_t low = half & 0x7fff, usual = (low << 13) + (112u << 23), small = bits_of((float)(int32_t)low * 0x1p-24f);
  return float_of((half & 0x8000) << 16 | (low < 0x400 ? small : usual));
}

/* The nearest float16. Below 2^-14, a sum with 1/2 has the step of subnormal ones. */
INLINE uint32_t to_half(float number) {
  uint32_t bits = bits_of(number), low = bits & 0x7fffffff, small = bits_of(float_of(low) + 0.5f) - 0x3f000000u;
  uint32_t usual = (low - (112u << 23) + 0xfff + (low >> 13 & 1)) >> 13, half = low < 0x38800000 ? small : usual;
  return (bits >> 16 & 0x8000) | (half < 0x7c00 ? half : 0x7c00);
}

/* The largest float16 that is not above a number. */
INLINE uint32_t half_below(float number) {
  uint32_t near = to_half(number);
  return from_half(near) > number ? near + (near & 0x8000 ? 1u : -1u) : near;
}

INLINE uint32_t half_above(float number) { return half_below(-number) ^ 0x8000; }

/* The nearest whole number, for small ones. */
INLINE float rounded(float number) { return (number + 0x1.8p23f) - 0x1.8p23f; }

INLINE float clipped(float number, float lowest, float highest) {
  return number < lowest ? lowest : number > highest ? highest : number;
}

/* The bits of the largest magnitude of a piece. */
INLINE uint32_t largest(const uint8_t *in, int64_t numbers, int dtype) {
  if (dtype == FLOAT32) {
    uint32_t most = 0;
    for (int64_t i = 0; i < numbers; i++) {
      uint32_t bits = ((const Long *)in)[i] & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    return most;
  }
  uint16_t most = 0;
  for (int64_t i = 0; i < numbers; i++) {
    uint16_t bits = ((const Word *)in)[i] & 0x7fff;
    most = bits > most ? bits : most;
  }
  return most;
}

INLINE int is_finite(uint32_t magnitude, int dtype) {
  return magnitude < (dtype == FLOAT32 ? 0x7f800000u : dtype == BFLOAT16 ? 0x7f80u : 0x7c00u);
}

/* The numbers from number `first` of a piece on, times a power of two, with one zero. */
INLINE void load_numbers(float *restrict to, const uint8_t *restrict in, int64_t first, int64_t count, int dtype, float scale) {
  const Word *words = (const Word *)in + first;
  const Long *longs = (const Long *)in + first;
  if (dtype == BFLOAT16)
    for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)words[i] << 16) * scale + 0.0f;
  else if (dtype == FLOAT16)
    for (int64_t i = 0; i < count; i++) to[i] = from_half(words[i]) * scale + 0.0f;
  else
    for (int64_t i = 0; i < count; i++) to[i] = float_of(longs[i]) * scale + 0.0f;
}

INLINE uint16_t to_bfloat16(float number) {
  uint32_t bits = bits_of(number);
  return (uint16_t)((bits + (0x7fff + (bits >> 16 & 1))) >> 16);
}

INLINE void store_numbers(uint8_t *restrict out, int64_t first, const float *restrict from, int64_t count, int dtype) {
  Word *words = (Word *)out + first;
  Long *longs = (Long *)out + first;
  if (dtype == BFLOAT16)
    for (int64_t i = 0; i < count; i++) words[i] = to_bfloat16(from[i]);
  else if (dtype == FLOAT16)
    for (int64_t i = 0; i < count; i++) words[i] = (uint16_t)to_half(from[i]);
  else
    for (int64_t i = 0; i < count; i++) longs[i] = bits_of(from[i]);
}

INLINE void load_scales(float *restrict to, const Word *restrict halves, int64_t count, float scale) {
  for (int64_t i = 0; i < count; i++) to[i] = from_half(halves[i]) * scale;
}

INLINE int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

/* Codes of 2, 4 or 8 bits, in their order from the lowest bits of each byte up. */
INLINE void pack(uint8_t *restrict out, const uint8_t *restrict codes, int64_t count, int bits) {
  const int64_t whole = count * bits / 8;
  if (bits == 8) memcpy(out, codes, (size_t)count);
  else if (bits == 4)
    for (int64_t i = 0; i < whole; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
  else
    for (int64_t i = 0; i < whole; i++)
      out[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
  if (count * bits % 8) {
    uint8_t last = 0;
    for (int64_t i = whole * 8 / bits, shift = 0; i < count; i++, shift += bits) last |= (uint8_t)(codes[i] << shift);
    out[whole] = last;
  }
}

INLINE void unpack(uint8_t *restrict codes, const uint8_t *restrict in, int64_t count, int bits) {
  const int64_t whole = count * bits / 8;
  if (bits == 8) memcpy(codes, in, (size_t)count);
  else if (bits == 4)
    for (int64_t i = 0; i < whole; i++) codes[2 * i] = in[i] & 15, codes[2 * i + 1] = in[i] >> 4;
  else
    for (int64_t i = 0; i < whole; i++) {
      codes[4 * i] = in[i] & 3, codes[4 * i + 1] = in[i] >> 2 & 3;
      codes[4 * i + 2] = in[i] >> 4 & 3, codes[4 * i + 3] = in[i] >> 6;
    }
  for (int64_t i = whole * 8 / bits, shift = 0; i < count; i++, shift += bits)
    codes[i] = (uint8_t)(in[whole] >> shift & ((1 << bits) - 1));
}

#endif
