/* Codes in groups with a step and a lowest value each: groups.py, integers.py and quantspec.py in C, to the bit. */
#ifndef CAKE_GROUPS_H
#define CAKE_GROUPS_H

#include "piece.h"

/* Steps and lowest values of some groups, as bits and as numbers. Where a step is 0, `divisor` is 1. */
INLINE void choose_scales(Word *restrict steps, Word *restrict lowests, float *restrict step, float *restrict lowest,
                          const float *restrict least, const float *restrict most, int64_t count, float levels) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t low = half_below(least[i]), up = half_above((most[i] - from_half(low)) / levels);
    lowests[i] = (uint16_t)low, lowest[i] = from_half(low);
    steps[i] = (uint16_t)up, step[i] = from_half(up);
  }
}

INLINE uint8_t code_of(float number, float step, float lowest, float levels) {
  return (uint8_t)(int32_t)clipped(rounded((number - lowest) / (step > 0 ? step : 1.0f)), 0.0f, levels);
}

/* The code of what is left beside the upper code, in steps of a sixteenth, plus 8. */
INLINE uint8_t lower_code_of(float number, uint8_t upper, float step, float lowest) {
  float left = ((number - (float)(int32_t)upper * step) - lowest) / (step > 0 ? step : 1.0f);
  return (uint8_t)(int32_t)(clipped(rounded(left * 16.0f), -8.0f, 7.0f) + 8.0f);
}

INLINE void code_keys(uint8_t *restrict codes, uint8_t *restrict lower, const float *restrict numbers, const float *restrict step,
                      const float *restrict lowest, int64_t count, float levels) {
  for (int64_t i = 0; i < count; i++) codes[i] = code_of(numbers[i], step[i], lowest[i], levels);
  if (lower)
    for (int64_t i = 0; i < count; i++) lower[i] = lower_code_of(numbers[i], codes[i], step[i], lowest[i]);
}

INLINE void code_values(uint8_t *restrict codes, uint8_t *restrict lower, const float *restrict numbers, float step, float lowest,
                        int64_t count, float levels) {
  for (int64_t i = 0; i < count; i++) codes[i] = code_of(numbers[i], step, lowest, levels);
  if (lower)
    for (int64_t i = 0; i < count; i++) lower[i] = lower_code_of(numbers[i], codes[i], step, lowest);
}

/* Least and largest of some numbers that are not -0: their bits, the others' inverted, are in order as whole numbers. */
INLINE void bounds(float *least, float *most, const float *numbers, int64_t count) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits = (int32_t)bits_of(numbers[i]), order = bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1);
    low = order < low ? order : low;
    high = order > high ? order : high;
  }
  *least = float_of((uint32_t)(low ^ (int32_t)((uint32_t)(low >> 31) >> 1)));
  *most = float_of((uint32_t)(high ^ (int32_t)((uint32_t)(high >> 31) >> 1)));
}

INLINE void scale_keys(const Piece *piece, const uint8_t *in, float scale, int64_t first, int64_t end, uint8_t *words,
                       const Room *room, float levels) {
  const int64_t width = piece->width;
  float *restrict least = room->least, *restrict most = room->most, *restrict numbers = room->numbers;
  for (int64_t r = first; r < end; r++) {
    load_numbers(numbers, in, r * width, width, piece->dtype, scale);
    if (r == first) memcpy(least, numbers, (size_t)width * 4), memcpy(most, numbers, (size_t)width * 4);
    for (int64_t c = 0; c < width; c++) {
      least[c] = numbers[c] < least[c] ? numbers[c] : least[c];
      most[c] = numbers[c] > most[c] ? numbers[c] : most[c];
    }
  }
  Word *steps = (Word *)words + first / piece->size * width;
  choose_scales(steps, steps + piece->scales / 2, room->step, room->lowest, least, most, width, levels);
}

INLINE void scale_values(const Piece *piece, int64_t tile, int64_t rows, uint8_t *words, const Room *room, float levels) {
  const int64_t groups = rows * piece->per_row;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t at = g % piece->per_row * piece->size, left = piece->width - at;
    bounds(room->least + g, room->most + g, room->numbers + g / piece->per_row * piece->width + at,
           left < piece->size ? left : piece->size);
  }
  Word *steps = (Word *)words + tile * piece->per_row;
  choose_scales(steps, steps + piece->scales / 2, room->step, room->lowest, room->least, room->most, groups, levels);
}

INLINE void encode_groups(const Scheme *scheme, const Piece *piece, const uint8_t *in, float scale, uint8_t *words, uint8_t *base,
                          uint8_t *rest, const Room *room) {
  const float levels = (float)((1 << scheme->bits) - 1);
  const int64_t width = piece->width, size = piece->size;
  for (int64_t tile = 0; tile < piece->rows; tile += ROWS) {
    const int64_t rows = piece->rows - tile < ROWS ? piece->rows - tile : ROWS;
    if (!piece->values && tile % size == 0)
      scale_keys(piece, in, scale, tile, tile + size < piece->rows ? tile + size : piece->rows, words, room, levels);
    load_numbers(room->numbers, in, tile * width, rows * width, piece->dtype, scale);
    if (piece->values) scale_values(piece, tile, rows, words, room, levels);
    for (int64_t r = 0; r < rows; r++) {
      uint8_t *codes = room->codes + r * width, *lower = rest ? room->lower + r * width : NULL;
      const float *numbers = room->numbers + r * width;
      if (!piece->values) code_keys(codes, lower, numbers, room->step, room->lowest, width, levels);
      for (int64_t g = r * piece->per_row, at = 0; g < (r + 1) * piece->per_row; g++, at += size)
        code_values(codes + at, lower ? lower + at : NULL, numbers + at, room->step[g], room->lowest[g],
                    width - at < size ? width - at : size, levels);
    }
    pack(base + tile * width * scheme->bits / 8, room->codes, rows * width, scheme->bits);
    if (rest) pack(rest + tile * width / 2, room->lower, rows * width, 4);
  }
}

/* Upper and lower codes as one. */
INLINE void join(uint8_t *restrict upper, const uint8_t *restrict lower, int64_t count) {
  for (int64_t i = 0; i < count; i++) upper[i] = (uint8_t)(upper[i] << 4 | lower[i]);
}

/* Numbers from codes that are too large by `bias`. */
INLINE void decode_keys(float *restrict to, const uint8_t *restrict codes, int32_t bias, const float *restrict step,
                        const float *restrict lowest, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = (float)(codes[i] - bias) * step[i] + lowest[i];
}

INLINE void decode_values(float *restrict to, const uint8_t *restrict codes, int32_t bias, float step, float lowest,
                          int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = (float)(codes[i] - bias) * step + lowest;
}

INLINE void decode_groups(const Scheme *scheme, const Piece *piece, uint8_t *out, float scale, const uint8_t *words,
                          const uint8_t *base, const uint8_t *rest, const Room *room) {
  const int64_t width = piece->width, size = piece->size;
  const int32_t bias = rest ? 8 : 0;
  for (int64_t tile = 0; tile < piece->rows; tile += ROWS) {
    const int64_t rows = piece->rows - tile < ROWS ? piece->rows - tile : ROWS;
    const uint8_t *codes = base + tile * width * scheme->bits / 8;
    if (scheme->bits < 8) unpack(room->codes, codes, rows * width, scheme->bits), codes = room->codes;
    if (rest) {
      unpack(room->lower, rest + tile * width / 2, rows * width, 4);
      join(room->codes, room->lower, rows * width);
    }
    if (piece->values || tile % size == 0) {
      const int64_t first = piece->values ? tile * piece->per_row : tile / size * width;
      const int64_t count = piece->values ? rows * piece->per_row : width;
      load_scales(room->step, (const Word *)words + first, count, rest ? scale * 0x1p-4f : scale);
      load_scales(room->lowest, (const Word *)words + piece->scales / 2 + first, count, scale);
    }
    for (int64_t r = 0; r < rows; r++, codes += width) {
      float *numbers = room->numbers + r * width;
      if (!piece->values) decode_keys(numbers, codes, bias, room->step, room->lowest, width);
      for (int64_t g = r * piece->per_row, at = 0; g < (r + 1) * piece->per_row; g++, at += size)
        decode_values(numbers + at, codes + at, bias, room->step[g], room->lowest[g], width - at < size ? width - at : size);
    }
    store_numbers(out, tile * width, room->numbers, rows * width, piece->dtype);
  }
}

#endif
