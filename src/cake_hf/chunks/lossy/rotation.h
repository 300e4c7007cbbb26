/* Codes of rotated vectors: rotation.py in C, to the bit. */
#ifndef CAKE_ROTATION_H
#define CAKE_ROTATION_H

#include "piece.h"

static const float STEP = 0.3352f;

INLINE void load_signs(float *to, const uint8_t *signs, int64_t head_dim) {
  for (int64_t j = 0; j < head_dim; j++) to[j] = signs[j / 8 % 32] >> (7 - j % 8) & 1 ? -1.0f : 1.0f;
}

/* Multiplies `[head_dim, VECTORS]` by the matrix of Hadamard for each power of two in the head dimension, the largest first. */
INLINE void turn(float *numbers, int64_t head_dim) {
  int64_t at = 0;
  for (int bit = 20; bit >= 0; bit--) {
    const int64_t width = (int64_t)1 << bit;
    if (!(head_dim & width)) continue;
    float *part = numbers + at * VECTORS;
    for (int64_t half = 1; half < width; half *= 2)
      for (int64_t i = 0; i < width; i += 2 * half)
        for (int64_t j = i * VECTORS; j < (i + half) * VECTORS; j += VECTORS)
          for (int l = 0; l < VECTORS; l++) {
            float first = part[j + l], second = part[j + half * VECTORS + l];
            part[j + l] = first + second, part[j + half * VECTORS + l] = first - second;
          }
    const float scale = (bit & 1 ? 0x1.6a09e6p-1f : 1.0f) * power_of_two(-(bit / 2));
    for (int64_t i = 0; i < width * VECTORS; i++) part[i] *= scale;
    at += width;
  }
}

/* The root mean square of each vector of `[head_dim, VECTORS]`, by sums of pairs. */
INLINE void norms_of(float *restrict norms, float *restrict squares, const float *restrict numbers, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim * VECTORS; i++) squares[i] = numbers[i] * numbers[i];
  for (int64_t count = head_dim; count > 1; count = count / 2 + count % 2) {
    const int64_t half = count / 2 * VECTORS;
    for (int64_t i = 0; i < half; i++) squares[i] = squares[i] + squares[half + i];
    if (count % 2) memcpy(squares + half, squares + 2 * half, VECTORS * 4);
  }
  for (int l = 0; l < VECTORS; l++) norms[l] = __builtin_sqrtf(squares[l] / (float)head_dim);
}

INLINE void find_means(const Piece *piece, const uint8_t *in, float scale, Word *words, const Room *room) {
  const int64_t channels = piece->channels;
  float *restrict sums = room->most, *restrict numbers = room->numbers;
  memset(sums, 0, (size_t)channels * 4);
  for (int64_t t = 0; t < piece->tokens; t++) {
    load_numbers(numbers, in, t * channels, channels, piece->dtype, scale);
    for (int64_t c = 0; c < channels; c++) sums[c] += numbers[c];
  }
  for (int64_t c = 0; c < channels; c++) words[c] = (uint16_t)to_half(sums[c] / (float)piece->tokens);
}

INLINE void encode_vectors(const Scheme *scheme, const Piece *piece, const uint8_t *in, float scale, uint8_t *words, uint8_t *base,
                           const Room *room) {
  const int64_t dim = piece->head_dim, count = piece->numbers / dim;
  Word *norms = (Word *)words + (piece->values ? 0 : piece->channels);
  float *restrict turned = room->turned, *restrict numbers = room->numbers, *restrict signs = room->step;
  float *restrict means = room->least, step[VECTORS];
  uint8_t *restrict codes = room->codes, *restrict turned_codes = room->lower;
  load_signs(signs, scheme->signs, dim);
  if (!piece->values) find_means(piece, in, scale, (Word *)words, room);
  for (int64_t c = 0; c < piece->channels; c++) means[c] = piece->values ? 0.0f : from_half(((Word *)words)[c]);
  for (int64_t tile = 0; tile < count; tile += VECTORS) {
    const int64_t vectors = count - tile < VECTORS ? count - tile : VECTORS;
    if (vectors < VECTORS) memset(turned, 0, (size_t)(dim * VECTORS) * 4);
    for (int64_t l = 0; l < vectors; l++) {
      const float *mean = means + (tile + l) % piece->heads * dim;
      load_numbers(numbers, in, (tile + l) * dim, dim, piece->dtype, scale);
      for (int64_t j = 0; j < dim; j++) numbers[j] = (numbers[j] - mean[j]) * signs[j];
      for (int64_t j = 0; j < dim; j++) turned[j * VECTORS + l] = numbers[j];
    }
    turn(turned, dim);
    norms_of(step, room->squares, turned, dim);
    for (int64_t l = 0; l < VECTORS; l++) {
      uint32_t half = to_half(step[l]);
      if (l < vectors) norms[tile + l] = (uint16_t)half;
      step[l] = (half ? from_half(half) : 1.0f) * STEP;
    }
    for (int64_t j = 0; j < dim; j++)
      for (int64_t l = 0; l < VECTORS; l++) {
        float place = clipped(turned[j * VECTORS + l] / step[l], -8.0f, 7.0f);
        int32_t code = (int32_t)place;
        turned_codes[j * VECTORS + l] = (uint8_t)(code - ((float)code > place) + 8);
      }
    for (int64_t l = 0; l < vectors; l++)
      for (int64_t j = 0; j < dim; j++) codes[l * dim + j] = turned_codes[j * VECTORS + l];
    pack(base + tile * dim / 2, codes, vectors * dim, 4);
  }
}

INLINE void decode_vectors(const Scheme *scheme, const Piece *piece, uint8_t *out, float scale, const uint8_t *words,
                           const uint8_t *base, const Room *room) {
  const int64_t dim = piece->head_dim, count = piece->numbers / dim;
  const Word *norms = (const Word *)words + (piece->values ? 0 : piece->channels);
  float *restrict turned = room->turned, *restrict numbers = room->numbers, *restrict signs = room->step;
  float *restrict means = room->least, step[VECTORS] = {0};
  uint8_t *restrict codes = room->codes, *restrict turned_codes = room->lower;
  load_signs(signs, scheme->signs, dim);
  if (!piece->values) load_scales(means, (const Word *)words, piece->channels, 1.0f);
  memset(codes, 0, (size_t)(dim * VECTORS));
  for (int64_t tile = 0; tile < count; tile += VECTORS) {
    const int64_t vectors = count - tile < VECTORS ? count - tile : VECTORS;
    load_scales(step, norms + tile, vectors, 1.0f);
    unpack(codes, base + tile * dim / 2, vectors * dim, 4);
    for (int64_t l = 0; l < VECTORS; l++)
      for (int64_t j = 0; j < dim; j++) turned_codes[j * VECTORS + l] = codes[l * dim + j];
    for (int64_t j = 0; j < dim; j++)
      for (int64_t l = 0; l < VECTORS; l++)
        turned[j * VECTORS + l] = ((float)(int32_t)turned_codes[j * VECTORS + l] - 7.5f) * (step[l] * STEP);
    turn(turned, dim);
    for (int64_t l = 0; l < vectors; l++) {
      const float *mean = means + (tile + l) % piece->heads * dim;
      for (int64_t j = 0; j < dim; j++) numbers[j] = turned[j * VECTORS + l];
      for (int64_t j = 0; j < dim; j++) numbers[j] *= signs[j];
      if (!piece->values)
        for (int64_t j = 0; j < dim; j++) numbers[j] += mean[j];
      for (int64_t j = 0; j < dim; j++) numbers[j] *= scale;
      store_numbers(out, (tile + l) * dim, numbers, dim, piece->dtype);
    }
  }
}

#endif
