/* The lossless codec for bfloat16 KV: an 8-bit base and a 3-bit refinement per number. docs/format.md describes the bytes.
 *
 * lossless_numpy.py makes and reads the same bytes. Each kernel works on whole blocks of 256 numbers. Nothing is read or written
 * outside the given buffers, whatever they contain.
 */
#include "native.h"

enum { BLOCK = 256, LANES = 32, REST = 96 };                 /* numbers of a block and of a vector; bytes of its refinement */
enum { WINDOW = 7, ESCAPE = 7, LOWEST = 6, HIGHEST = 254 };  /* exponents of a window; code of those outside; bounds of its top */
enum { SAMPLED = 64, CANDIDATES = 4, TABLES = 3 + CANDIDATES };  /* tokens that decide about a window; tops that are tried */

typedef struct {       /* where the escaped exponents of a piece are read from, or written to */
  uint8_t *at;
  const uint8_t *end;  /* of the escapes, or of the room for them */
} Escapes;

/* Decodes a block into 512 bytes; returns 0 if there are fewer escapes than its codes ask for. `rest` is NULL for the base alone. */
typedef int Decode(uint8_t *out, const uint8_t *codes, const uint8_t *rest, const uint8_t *tops, Escapes *escapes);
/* Encodes a block of 512 bytes; returns 0 if there is not enough room for its escapes. */
typedef int Encode(const uint8_t *in, uint8_t *codes, uint8_t *rest, const uint8_t *tops, Escapes *escapes);

/* The low mantissa bits of what is decoded from the base alone: the middle of what they may be; 0 for zeros, infinities and NaN. */
INLINE uint8_t middle(uint8_t exponent) { return (uint8_t)(exponent == 0 || exponent == 255 ? 0 : 4); }

/* ---- portable kernels */

static int decode_portable(uint8_t *out, const uint8_t *codes, const uint8_t *rest, const uint8_t *tops, Escapes *escapes) {
  uint8_t exponents[BLOCK], low[BLOCK];
  uint16_t numbers[BLOCK];
  for (int i = 0; i < BLOCK; i++) exponents[i] = (uint8_t)(tops[i] - (codes[i] >> 4 & 7));
  for (int i = 0; i < BLOCK; i += 8) {
    uint64_t word;
    memcpy(&word, codes + i, 8);
    word &= 0x7070707070707070u;
    word = word & word << 1 & word << 2 & 0x4040404040404040u;  /* a bit for each escape */
    for (; word; word &= word - 1) {
      if (escapes->at == escapes->end) return 0;
      exponents[i + (__builtin_ctzll(word) >> 3)] = *escapes->at++;
    }
  }
  if (rest) {
    for (int s = 0; s < 8; s++)
      for (int i = 0; i < LANES; i++)
        low[LANES * s + i] =
            (uint8_t)((rest[LANES * (s / 4) + i] >> 2 * (s & 3) & 3) | (rest[2 * LANES + i] >> s & 1) << 2);
  } else {
    for (int i = 0; i < BLOCK; i++) low[i] = middle(exponents[i]);
  }
  for (int i = 0; i < BLOCK; i++)
    numbers[i] = (uint16_t)((codes[i] & 0x80) << 8 | exponents[i] << 7 | (codes[i] & 15) << 3 | low[i]);
  memcpy(out, numbers, sizeof numbers);
  return 1;
}

static int encode_portable(const uint8_t *in, uint8_t *codes, uint8_t *rest, const uint8_t *tops, Escapes *escapes) {
  uint16_t numbers[BLOCK];
  memcpy(numbers, in, sizeof numbers);
  for (int i = 0; i < BLOCK; i++) {
    uint8_t below = (uint8_t)(tops[i] - (uint8_t)(numbers[i] >> 7)), code = below < ESCAPE ? below : ESCAPE;
    codes[i] = (uint8_t)((numbers[i] >> 8 & 0x80) | code << 4 | (numbers[i] >> 3 & 15));
  }
  memset(rest, 0, REST);
  for (int s = 0; s < 8; s++)
    for (int i = 0; i < LANES; i++) {
      uint8_t low = numbers[LANES * s + i] & 7;
      rest[LANES * (s / 4) + i] |= (uint8_t)((low & 3) << 2 * (s & 3));
      rest[2 * LANES + i] |= (uint8_t)(low >> 2 << s);
    }
  for (int i = 0; i < BLOCK; i++)
    if ((codes[i] & 0x70) == 0x70) {
      if (escapes->at == escapes->end) return 0;
      *escapes->at++ = (uint8_t)(numbers[i] >> 7);
    }
  return 1;
}

/* ---- AVX2 kernels */

#ifdef AVX2
/* For each mask of 8 lanes and each lane: the number of lanes in the mask before it, if it is itself in the mask; else 0x80. */
#define BEFORE(m, i) ((m) >> (i) & 1 ? (uint8_t)(((m) & 1) * ((i) > 0) + ((m) >> 1 & 1) * ((i) > 1) + ((m) >> 2 & 1) * ((i) > 2) \
  + ((m) >> 3 & 1) * ((i) > 3) + ((m) >> 4 & 1) * ((i) > 4) + ((m) >> 5 & 1) * ((i) > 5) + ((m) >> 6 & 1) * ((i) > 6)) : 0x80)
#define ROW(m) {BEFORE(m, 0), BEFORE(m, 1), BEFORE(m, 2), BEFORE(m, 3), BEFORE(m, 4), BEFORE(m, 5), BEFORE(m, 6), BEFORE(m, 7)}
#define ROWS4(m) ROW(m), ROW((m) + 1), ROW((m) + 2), ROW((m) + 3)
#define ROWS16(m) ROWS4(m), ROWS4((m) + 4), ROWS4((m) + 8), ROWS4((m) + 12)
#define ROWS64(m) ROWS16(m), ROWS16((m) + 16), ROWS16((m) + 32), ROWS16((m) + 48)
static const uint8_t SPREAD[256][8] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

INLINE AVX2 __m256i load(const uint8_t *from) { return _mm256_loadu_si256((const void *)from); }
INLINE AVX2 void store(uint8_t *to, __m256i vector) { _mm256_storeu_si256((void *)to, vector); }
INLINE AVX2 __m256i only(__m256i vector, int bits) { return _mm256_and_si256(vector, _mm256_set1_epi8((char)bits)); }

/* Puts the next bytes into the lanes of a mask. At least 8 bytes can be read from each place where a byte may be taken. */
INLINE AVX2 __m256i spread(uint32_t mask, const uint8_t **from) {
  int64_t words[4];
  for (int i = 0; i < 4; i++) {
    uint8_t lanes = (uint8_t)(mask >> 8 * i);
    __m128i bytes = _mm_loadl_epi64((const void *)*from), order = _mm_loadl_epi64((const void *)SPREAD[lanes]);
    words[i] = _mm_cvtsi128_si64(_mm_shuffle_epi8(bytes, order));
    *from += __builtin_popcount(lanes);
  }
  return _mm256_set_epi64x(words[3], words[2], words[1], words[0]);
}

INLINE AVX2 int decode_vectors(uint8_t *out, const uint8_t *codes, const uint8_t *rest, const uint8_t *tops, Escapes *escapes) {
  const __m256i escaped = _mm256_set1_epi8(0x70);
  uint8_t last[BLOCK + 8];
  const uint8_t *from = escapes->at;
  size_t left = (size_t)(escapes->end - escapes->at), used = 0;
  uint32_t masks[8];
  for (int s = 0; s < 8; s++) {
    masks[s] = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(only(load(codes + LANES * s), 0x70), escaped));
    used += (size_t)__builtin_popcount(masks[s]);
  }
  if (used > left) return 0;
  if (left - used < 8) {  /* the next 8 bytes may not all be readable */
    memset(last + used, 0, 8);
    memcpy(last, from, used);
    from = last;
  }
  escapes->at += used;
  __m256i pairs[2], top_bits;
  if (rest) pairs[0] = load(rest), pairs[1] = load(rest + LANES), top_bits = load(rest + 2 * LANES);
#pragma GCC unroll 8
  for (int s = 0; s < 8; s++) {
    __m256i code = load(codes + LANES * s), high = only(code, 0x70), low;
    __m256i exponent = _mm256_sub_epi8(load(tops + LANES * s), _mm256_srli_epi16(high, 4));
    exponent = _mm256_blendv_epi8(exponent, spread(masks[s], &from), _mm256_cmpeq_epi8(high, escaped));
    if (rest) {
      low = only(_mm256_srli_epi16(pairs[s / 4], 2 * (s & 3)), 3);
      __m256i bit = s < 2 ? _mm256_slli_epi16(top_bits, 2 - s) : _mm256_srli_epi16(top_bits, s - 2);
      low = _mm256_or_si256(low, only(bit, 4));
    } else {
      __m256i special = _mm256_or_si256(_mm256_cmpeq_epi8(exponent, _mm256_setzero_si256()),
                                        _mm256_cmpeq_epi8(exponent, _mm256_set1_epi8((char)255)));
      low = _mm256_andnot_si256(special, _mm256_set1_epi8(4));
    }
    low = _mm256_or_si256(low, only(_mm256_slli_epi16(code, 3), 0x78));
    low = _mm256_or_si256(low, only(_mm256_slli_epi16(exponent, 7), 0x80));
    high = _mm256_or_si256(only(code, 0x80), only(_mm256_srli_epi16(exponent, 1), 0x7f));
    __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    store(out + 2 * LANES * s, _mm256_permute2x128_si256(even, odd, 0x20));
    store(out + 2 * LANES * s + LANES, _mm256_permute2x128_si256(even, odd, 0x31));
  }
  return 1;
}

static AVX2 int decode_avx2(uint8_t *out, const uint8_t *codes, const uint8_t *rest, const uint8_t *tops, Escapes *escapes) {
  return rest ? decode_vectors(out, codes, rest, tops, escapes) : decode_vectors(out, codes, NULL, tops, escapes);
}

static AVX2 int encode_avx2(const uint8_t *in, uint8_t *codes, uint8_t *rest, const uint8_t *tops, Escapes *escapes) {
  const __m256i byte = _mm256_set1_epi16(255), escape = _mm256_set1_epi8(ESCAPE);
  __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, top_bits = _mm256_setzero_si256();
  uint8_t exponents[BLOCK];
  uint64_t masks[4] = {0};
#pragma GCC unroll 8
  for (int s = 0; s < 8; s++) {
    __m256i first = load(in + 2 * LANES * s), second = load(in + 2 * LANES * s + LANES);
    __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
    __m256i low = _mm256_packus_epi16(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte));
    high = _mm256_permute4x64_epi64(high, 0xd8), low = _mm256_permute4x64_epi64(low, 0xd8);
    __m256i exponent = _mm256_or_si256(_mm256_add_epi8(high, high), only(_mm256_srli_epi16(low, 7), 1));
    __m256i code = _mm256_min_epu8(_mm256_sub_epi8(load(tops + LANES * s), exponent), escape);
    store(exponents + LANES * s, exponent);
    masks[s / 2] |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, escape)) << LANES * (s & 1);
    code = _mm256_or_si256(only(high, 0x80), _mm256_slli_epi16(code, 4));
    store(codes + LANES * s, _mm256_or_si256(code, only(_mm256_srli_epi16(low, 3), 15)));
    pairs[s / 4] = _mm256_or_si256(pairs[s / 4], _mm256_slli_epi16(only(low, 3), 2 * (s & 3)));
    top_bits = _mm256_or_si256(top_bits, _mm256_slli_epi16(only(_mm256_srli_epi16(low, 2), 1), s));
  }
  store(rest, pairs[0]), store(rest + LANES, pairs[1]), store(rest + 2 * LANES, top_bits);
  ptrdiff_t count = 0;
  for (int i = 0; i < 4; i++) count += __builtin_popcountll(masks[i]);
  if (count > escapes->end - escapes->at) return 0;
  for (int i = 0; i < 4; i++)
    for (uint64_t mask = masks[i]; mask; mask &= mask - 1) *escapes->at++ = exponents[64 * i + __builtin_ctzll(mask)];
  return 1;
}
#endif

/* ---- whole pieces */

/* Repeats a table of window tops, so that those of any block lie in a row. */
static void repeat(uint8_t *tops, int64_t channels) {
  for (int64_t i = channels; i < channels + BLOCK; i++) tops[i] = tops[i - channels];
}

static int64_t rest_size(int64_t numbers) { return (numbers + BLOCK - 1) / BLOCK * REST; }

static int fits(int64_t nbytes, int64_t channels) {
  return channels > 0 && channels <= MOST_CHANNELS && nbytes > 0 && nbytes <= MOST_BYTES && nbytes % (2 * channels) == 0;
}

/* The most channels of any piece that has not too many. */
static int64_t most_channels(const int64_t *channels, int64_t count, int64_t stride) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++)
    if (channels[i * stride] > most && channels[i * stride] <= MOST_CHANNELS) most = channels[i * stride];
  return most;
}

static int decode_piece(Decode *decode, const uint8_t *base, int64_t base_bytes, const uint8_t *rest, int64_t rest_bytes,
                        uint8_t *out, int64_t out_bytes, int64_t channels, uint8_t *tops) {
  if (!fits(out_bytes, channels)) return BAD_SIZES;
  const int64_t numbers = out_bytes / 2, whole = numbers / BLOCK, left = numbers % BLOCK, step = BLOCK % channels;
  if (base_bytes < channels + numbers || base_bytes > out_bytes + channels) return BAD_SIZES;
  if (rest && rest_bytes != rest_size(numbers)) return BAD_SIZES;
  for (int64_t i = 0; i < channels; i++)
    if (base[i] < LOWEST || base[i] > HIGHEST) return BAD_TABLE;
  memcpy(tops, base, (size_t)channels);
  repeat(tops, channels);
  const uint8_t *codes = base + channels;
  Escapes escapes = {(uint8_t *)codes + numbers, base + base_bytes};
  int64_t at = 0;
  for (int64_t i = 0; i < whole; i++) {
    if (!decode(out, codes, rest, tops + at, &escapes)) return BAD_ESCAPES;
    out += 2 * BLOCK, codes += BLOCK, at += step;
    if (rest) rest += REST;
    if (at >= channels) at -= channels;
  }
  if (left) {
    uint8_t last[BLOCK] = {0}, numbers_of_last[2 * BLOCK];
    memcpy(last, codes, (size_t)left);
    if (!decode(numbers_of_last, last, rest, tops + at, &escapes)) return BAD_ESCAPES;
    memcpy(out, numbers_of_last, (size_t)(2 * left));
  }
  return escapes.at == escapes.end ? OK : BAD_ESCAPES;
}

INLINE uint8_t exponent_at(const uint8_t *number) { return (uint8_t)(number[1] << 1 | number[0] >> 7); }

/* Chooses each channel's window by some of the tokens: of four around the mean exponent of what is not zero, the one that holds
 * most of them. `room` has TABLES bytes per channel. */
INLINE void choose_windows(uint8_t *restrict tops, uint16_t *restrict room, const uint8_t *in, int64_t tokens, int64_t channels) {
  uint8_t *restrict lowest_top = (uint8_t *)(room + channels), *restrict counts = lowest_top + channels;
  const int64_t step = (tokens + SAMPLED - 1) / SAMPLED, first = step / 2;
  memset(room, 0, (size_t)(TABLES * channels));
  for (int64_t t = first; t < tokens; t += step)
    for (int64_t c = 0; c < channels; c++) {
      uint8_t e = exponent_at(in + 2 * (t * channels + c));
      room[c] = (uint16_t)(room[c] + e);
      counts[c] = (uint8_t)(counts[c] + (e != 0));
    }
  for (int64_t c = 0; c < channels; c++) {
    int mean = counts[c] ? room[c] / counts[c] : 0;
    lowest_top[c] = (uint8_t)(mean < HIGHEST ? mean + 1 : HIGHEST);
    counts[c] = 0;
  }
  for (int64_t t = first; t < tokens; t += step)
    for (int j = 0; j < CANDIDATES; j++) {
      uint8_t *restrict count = counts + j * channels;
      for (int64_t c = 0; c < channels; c++) {
        uint8_t below = (uint8_t)(lowest_top[c] + j - exponent_at(in + 2 * (t * channels + c)));
        count[c] = (uint8_t)(count[c] + (below < WINDOW));
      }
    }
  for (int64_t c = 0; c < channels; c++) {
    int best = 0;
    for (int j = 1; j < CANDIDATES; j++)
      if (counts[j * channels + c] > counts[best * channels + c]) best = j;
    int top = lowest_top[c] + best;
    tops[c] = (uint8_t)(top < LOWEST ? LOWEST : top > HIGHEST ? HIGHEST : top);
  }
}

typedef void Choose(uint8_t *tops, uint16_t *room, const uint8_t *in, int64_t tokens, int64_t channels);

static void choose_portable(uint8_t *tops, uint16_t *room, const uint8_t *in, int64_t tokens, int64_t channels) {
  choose_windows(tops, room, in, tokens, channels);
}

#ifdef AVX2
static AVX2 void choose_avx2(uint8_t *tops, uint16_t *room, const uint8_t *in, int64_t tokens, int64_t channels) {
  choose_windows(tops, room, in, tokens, channels);
}
#endif

/* Encodes a piece; returns the bytes of its base, or 0 if it would not shrink. There is room for the piece and for its refinement. */
static int64_t encode_piece(Encode *encode, Choose *choose, const uint8_t *in, int64_t nbytes, int64_t channels, uint8_t *base,
                            uint8_t *rest, uint8_t *tops, uint16_t *room_to_choose) {
  const int64_t numbers = nbytes / 2, whole = numbers / BLOCK, left = numbers % BLOCK, step = BLOCK % channels;
  const int64_t room = nbytes - 1 - channels - numbers - rest_size(numbers);
  if (room < 0) return 0;
  choose(tops, room_to_choose, in, numbers / channels, channels);
  repeat(tops, channels);
  memcpy(base, tops, (size_t)channels);
  uint8_t *codes = base + channels;
  Escapes escapes = {codes + numbers, codes + numbers + room};
  int64_t at = 0;
  for (int64_t i = 0; i < whole; i++) {
    if (!encode(in, codes, rest, tops + at, &escapes)) return 0;
    in += 2 * BLOCK, codes += BLOCK, rest += REST, at += step;
    if (at >= channels) at -= channels;
  }
  if (left) {
    uint8_t numbers_of_last[2 * BLOCK], last[BLOCK];
    for (int i = 0; i < BLOCK; i++) {  /* what fills the block is in its window */
      numbers_of_last[2 * i] = (uint8_t)(tops[at + i] << 7);
      numbers_of_last[2 * i + 1] = tops[at + i] >> 1;
    }
    memcpy(numbers_of_last, in, (size_t)(2 * left));
    if (!encode(numbers_of_last, last, rest, tops + at, &escapes)) return 0;
    memcpy(codes, last, (size_t)left);
  }
  return escapes.at - base;
}

/* ---- the interface */

API int cake_abi(void) { return ABI; }

/* Decodes the pieces of a chunk. Of each, `rows` has: base, its bytes, refinement, its bytes, destination, its bytes, channels.
 * Without channels the base is the piece itself. With `near` the base alone is decoded.
 * Returns 0, or the number of the piece at fault times 256 plus what is wrong. */
API int64_t cake_decode(int variant, int near, int64_t count, const int64_t *rows) {
  enum { FIELDS = 7 };
  Decode *decode = CHOOSE(variant, decode);
  uint8_t *tops = malloc((size_t)(most_channels(rows + 6, count, FIELDS) + BLOCK));
  if (!tops) return NO_MEMORY;
  int64_t result = OK;
  for (int64_t i = 0; i < count && !result; i++, rows += FIELDS) {
    const uint8_t *base = (const uint8_t *)(uintptr_t)rows[0], *rest = (const uint8_t *)(uintptr_t)rows[2];
    uint8_t *out = (uint8_t *)(uintptr_t)rows[4];
    int wrong = OK;
    if (rows[6] && !near && !rest) wrong = BAD_SIZES;
    else if (rows[6]) wrong = decode_piece(decode, base, rows[1], near ? NULL : rest, rows[3], out, rows[5], rows[6], tops);
    else if (rows[1] != rows[5] || rows[1] < 0) wrong = BAD_SIZES;
    else if (rows[1]) memcpy(out, base, (size_t)rows[1]);
    if (wrong) result = i * 256 + wrong;
  }
  free(tops);
  return result;
}

/* Encodes the pieces of a chunk: the bases back to back, and the refinements back to back. Of each piece, `rows` has: source, its
 * bytes, channels (0 if it is not bfloat16), and room for the bytes of its base and of its refinement. A piece that would not shrink
 * is its own base and has no refinement. There must be room for all pieces as they are, and for all their refinements.
 * Returns like `cake_decode`. */
API int64_t cake_encode(int variant, int64_t count, int64_t *rows, uint8_t *bases, int64_t bases_room, uint8_t *rests,
                        int64_t rests_room) {
  enum { FIELDS = 5 };
  Encode *encode = CHOOSE(variant, encode);
  Choose *choose = CHOOSE(variant, choose);
  const int64_t most = most_channels(rows + 2, count, FIELDS);
  uint16_t *room_to_choose = malloc((size_t)((TABLES + 1) * most + BLOCK));
  if (!room_to_choose) return NO_MEMORY;
  uint8_t *tops = (uint8_t *)room_to_choose + TABLES * most;
  int64_t result = OK;
  for (int64_t i = 0; i < count && !result; i++, rows += FIELDS) {
    const uint8_t *in = (const uint8_t *)(uintptr_t)rows[0];
    const int64_t nbytes = rows[1], channels = rows[2], needed = fits(nbytes, channels) ? rest_size(nbytes / 2) : 0;
    if (nbytes < 0 || nbytes > bases_room || needed > rests_room) {
      result = i * 256 + BAD_SIZES;
      break;
    }
    rows[3] = needed ? encode_piece(encode, choose, in, nbytes, channels, bases, rests, tops, room_to_choose) : 0;
    rows[4] = rows[3] ? needed : 0;
    if (!rows[3]) {
      if (nbytes) memcpy(bases, in, (size_t)nbytes);
      rows[3] = nbytes;
    }
    bases += rows[3], bases_room -= rows[3], rests += rows[4], rests_room -= rows[4];
  }
  free(room_to_choose);
  return result;
}
