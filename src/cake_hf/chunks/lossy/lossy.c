/* The lossy codecs int8, int4, kivi2, quantspec and rot4: what coding.py does with a chunk, in C and to the bit, in one call.
 * Nothing is read or written outside the given buffers, whatever they contain.
 */
#include "groups.h"
#include "rotation.h"

/* ---- whole pieces */

/* Fills in what follows from dtype, role and shape; returns whether such a piece can be. */
INLINE int shape_piece(const Scheme *scheme, Piece *piece) {
  if (piece->nbytes < 0 || piece->nbytes > MOST_BYTES) return 0;
  if (piece->dtype == WHOLE) return 1;
  const int64_t item = piece->dtype == FLOAT32 ? 4 : 2;
  if (piece->heads < 1 || piece->head_dim < 1 || piece->heads > MOST_CHANNELS || piece->head_dim > MOST_CHANNELS) return 0;
  if (piece->tokens < 1 || piece->tokens > MOST_BYTES || piece->heads * piece->head_dim > MOST_CHANNELS) return 0;
  piece->channels = piece->heads * piece->head_dim, piece->numbers = piece->nbytes / item;
  if (piece->nbytes % (item * piece->channels) || piece->numbers / piece->channels != piece->tokens) return 0;
  const int by_head = piece->values && !scheme->size;
  piece->rows = by_head ? piece->tokens * piece->heads : piece->tokens;
  piece->width = by_head ? piece->head_dim : piece->channels;
  piece->size = scheme->size ? scheme->size : piece->values ? piece->width : piece->rows;
  piece->per_row = piece->values ? (piece->width + piece->size - 1) / piece->size : 0;
  if (scheme->scheme == ROTATED) piece->scales = piece->tokens * piece->heads + (piece->values ? 0 : piece->channels);
  else if (piece->values) piece->scales = 2 * piece->rows * piece->per_row;
  else piece->scales = 2 * ((piece->rows + piece->size - 1) / piece->size) * piece->width;
  piece->base_bytes = 2 + 2 * piece->scales + packed_bytes(piece->numbers, scheme->bits);
  piece->rest_bytes = scheme->scheme == LAYERED ? packed_bytes(piece->numbers, 4) : 0;
  return 1;
}

/* Decodes a piece whose base and refinement have the right sizes. */
INLINE int decode_piece(const Scheme *scheme, const Piece *piece, const uint8_t *base, const uint8_t *rest, uint8_t *out,
                        const Room *room) {
  const int16_t exponent = (int16_t)*(const Word *)base;
  const uint8_t *words = base + 2, *codes = words + 2 * piece->scales;
  if (exponent < SMALLEST || exponent > LARGEST || !is_finite(largest(words, piece->scales, FLOAT16), FLOAT16)) return BAD_SCALES;
  const float scale = power_of_two(exponent - TOP);
  if (scheme->scheme == ROTATED) decode_vectors(scheme, piece, out, scale, words, codes, room);
  else decode_groups(scheme, piece, out, scale, words, codes, scheme->scheme == LAYERED ? rest : NULL, room);
  return OK;
}

/* Encodes a piece, times `scale`, behind the exponent in its base. */
INLINE void encode_piece(const Scheme *scheme, const Piece *piece, const uint8_t *in, float scale, uint8_t *base, uint8_t *rest,
                         const Room *room) {
  uint8_t *words = base + 2, *codes = words + 2 * piece->scales;
  if (scheme->scheme == ROTATED) encode_vectors(scheme, piece, in, scale, words, codes, room);
  else encode_groups(scheme, piece, in, scale, words, codes, scheme->scheme == LAYERED ? rest : NULL, room);
}

typedef int Decode(const Scheme *scheme, const Piece *piece, const uint8_t *base, const uint8_t *rest, uint8_t *out,
                   const Room *room);
typedef uint32_t Largest(const uint8_t *in, int64_t numbers, int dtype);

#define KERNELS(variant, target)                                                                                          \
  static target int decode_##variant(const Scheme *scheme, const Piece *piece, const uint8_t *base, const uint8_t *rest,  \
                                     uint8_t *out, const Room *room) {                                                    \
    return decode_piece(scheme, piece, base, rest, out, room);                                                            \
  }                                                                                                                       \
  static target void encode_##variant(const Scheme *scheme, const Piece *piece, const uint8_t *in, float scale,           \
                                      uint8_t *base, uint8_t *rest, const Room *room) {                                   \
    encode_piece(scheme, piece, in, scale, base, rest, room);                                                             \
  }                                                                                                                       \
  static target uint32_t largest_##variant(const uint8_t *in, int64_t numbers, int dtype) {                               \
    return largest(in, numbers, dtype);                                                                                   \
  }

KERNELS(portable, )
#ifdef AVX2
KERNELS(avx2, AVX2)
#endif

/* Encodes a piece, and replaces its numbers by what they decode to; returns 0 and leaves it as it is if it is not to be encoded.
 * `decoded` has room for it. */
static int encode_and_replace(int variant, const Scheme *scheme, const Piece *piece, uint8_t *in, uint8_t *base, uint8_t *rest,
                              uint8_t *decoded, const Room *room) {
  Largest *largest = CHOOSE(variant, largest);
  if (piece->base_bytes + piece->rest_bytes >= piece->nbytes) return 0;
  const uint32_t most = largest(in, piece->numbers, piece->dtype);
  if (!is_finite(most, piece->dtype)) return 0;
  const uint32_t bits = piece->dtype == BFLOAT16 ? most << 16 : piece->dtype == FLOAT16 ? bits_of(from_half(most)) : most;
  const int exponent = bits ? (int)(bits >> 23) - 126 : SMALLEST;
  if (exponent < SMALLEST || exponent > LARGEST) return 0;
  *(Word *)base = (uint16_t)exponent;
  CHOOSE(variant, encode)(scheme, piece, in, power_of_two(TOP - exponent), base, rest, room);
  if (CHOOSE(variant, decode)(scheme, piece, base, rest, decoded, room)) return 0;
  if (!is_finite(largest(decoded, piece->numbers, piece->dtype), piece->dtype)) return 0;
  memcpy(in, decoded, (size_t)piece->nbytes);
  return 1;
}

/* ---- the interface */

enum { DTYPE, VALUES, HEADS, HEAD_DIM, BYTES, SHAPE_FIELDS };  /* of a piece, in front of what else its row has */

static int read_piece(const Scheme *scheme, int64_t tokens, const int64_t *row, Piece *piece) {
  *piece = (Piece){.tokens = tokens, .heads = row[HEADS], .head_dim = row[HEAD_DIM], .nbytes = row[BYTES]};
  if (row[DTYPE] < WHOLE || row[DTYPE] > FLOAT32) return 0;
  piece->dtype = (int)row[DTYPE], piece->values = row[VALUES] != 0;
  return shape_piece(scheme, piece);
}

/* Memory for any of these pieces; to be freed by its `numbers`, which is NULL if there is none. Also finds the largest piece. */
static Room make_room(const Scheme *scheme, int64_t tokens, int64_t count, const int64_t *rows, int64_t fields, int64_t *largest) {
  size_t channels = 1, dim = 1;
  *largest = 1;
  for (int64_t i = 0; i < count; i++, rows += fields) {
    Piece piece;
    if (!read_piece(scheme, tokens, rows, &piece) || !piece.dtype) continue;
    if ((size_t)piece.channels > channels) channels = (size_t)piece.channels;
    if ((size_t)piece.head_dim > dim) dim = (size_t)piece.head_dim;
    if (piece.nbytes > *largest) *largest = piece.nbytes;
  }
  const size_t groups = channels + ROWS, vectors = scheme->scheme == ROTATED ? VECTORS * dim : 0;
  float *at = malloc((ROWS * channels + 4 * groups + 2 * vectors) * sizeof(float) + 2 * (ROWS * channels + vectors));
  if (!at) return (Room){0};
  Room room = {.numbers = at};
  at += ROWS * channels;
  float **parts[] = {&room.least, &room.most, &room.step, &room.lowest};
  for (int i = 0; i < 4; i++, at += groups) *parts[i] = at;
  room.turned = at, room.squares = at + vectors;
  room.lower = (uint8_t *)(at + 2 * vectors);
  room.codes = room.lower + ROWS * channels + vectors;
  return room;
}

static int read_scheme(Scheme *scheme, int kind, int bits, int64_t size, const uint8_t *signs) {
  *scheme = (Scheme){kind, bits, size, signs};
  if (kind != GROUPED && bits != 4) return 0;
  return kind >= GROUPED && kind <= ROTATED && (bits == 2 || bits == 4 || bits == 8) && size >= 0 && size % ROWS == 0;
}

/* Arithmetic as it is by default, with subnormal numbers, whatever the thread has set. Returns its setting, for
 * `restore_arithmetic`. */
static unsigned set_arithmetic(void) {
#ifdef AVX2
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80);
  return before;
#else
  return 0;
#endif
}

static void restore_arithmetic(unsigned before) {
#ifdef AVX2
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

/* Decodes the pieces of a chunk. Of each, `rows` has: dtype, whether it has values, heads, head_dim, bytes, destination, base, its
 * bytes, refinement, its bytes. `signs` has 32 bytes if the scheme is ROTATED.
 * Returns 0, or the number of the piece at fault times 256 plus what is wrong. */
API int64_t cake_lossy_decode(int variant, int kind, int bits, int64_t size, const uint8_t *signs, int64_t tokens, int64_t count,
                              const int64_t *rows) {
  enum { OUT = SHAPE_FIELDS, BASE, BASE_BYTES, REST, REST_BYTES, FIELDS };
  Decode *decode = CHOOSE(variant, decode);
  Scheme scheme;
  int64_t largest;
  if (!read_scheme(&scheme, kind, bits, size, signs)) return BAD_SIZES;
  Room room = make_room(&scheme, tokens, count, rows, FIELDS, &largest);
  if (!room.numbers) return NO_MEMORY;
  const unsigned before = set_arithmetic();
  int64_t result = OK;
  for (int64_t i = 0; i < count && !result; i++, rows += FIELDS) {
    const uint8_t *base = (const uint8_t *)(uintptr_t)rows[BASE], *rest = (const uint8_t *)(uintptr_t)rows[REST];
    uint8_t *out = (uint8_t *)(uintptr_t)rows[OUT];
    Piece piece;
    int wrong = read_piece(&scheme, tokens, rows, &piece) ? OK : BAD_SIZES;
    const int64_t base_bytes = piece.dtype ? piece.base_bytes : piece.nbytes;
    if (wrong || rows[BASE_BYTES] != base_bytes || rows[REST_BYTES] != piece.rest_bytes) wrong = BAD_SIZES;
    else if (piece.dtype) wrong = decode(&scheme, &piece, base, rest, out, &room);
    else if (piece.nbytes) memcpy(out, base, (size_t)piece.nbytes);
    if (wrong) result = i * 256 + wrong;
  }
  restore_arithmetic(before);
  free(room.numbers);
  return result;
}

/* Encodes the pieces of a chunk, the bases back to back and the refinements back to back, and replaces their numbers by what they
 * decode to. Of each piece, `rows` has: dtype, whether it has values, heads, head_dim, bytes, source, and room for the bytes of its
 * base and of its refinement. A piece that is not encoded is its own base. There must be room for all pieces as they are, and for
 * all their refinements. Returns like `cake_lossy_decode`. */
API int64_t cake_lossy_encode(int variant, int kind, int bits, int64_t size, const uint8_t *signs, int64_t tokens, int64_t count,
                              int64_t *rows, uint8_t *bases, int64_t bases_room, uint8_t *rests, int64_t rests_room) {
  enum { IN = SHAPE_FIELDS, BASE_BYTES, REST_BYTES, FIELDS };
  Scheme scheme;
  int64_t largest;
  if (!read_scheme(&scheme, kind, bits, size, signs)) return BAD_SIZES;
  Room room = make_room(&scheme, tokens, count, rows, FIELDS, &largest);
  uint8_t *decoded = room.numbers ? malloc((size_t)largest) : NULL;
  const unsigned before = set_arithmetic();
  int64_t result = decoded ? OK : NO_MEMORY;
  for (int64_t i = 0; i < count && !result; i++, rows += FIELDS) {
    uint8_t *in = (uint8_t *)(uintptr_t)rows[IN];
    Piece piece;
    if (!read_piece(&scheme, tokens, rows, &piece) || piece.nbytes > bases_room || piece.rest_bytes > rests_room) {
      result = i * 256 + BAD_SIZES;
      break;
    }
    const int encoded = piece.dtype && encode_and_replace(variant, &scheme, &piece, in, bases, rests, decoded, &room);
    if (!encoded && piece.nbytes) memcpy(bases, in, (size_t)piece.nbytes);
    rows[BASE_BYTES] = encoded ? piece.base_bytes : piece.nbytes, rows[REST_BYTES] = encoded ? piece.rest_bytes : 0;
    bases += rows[BASE_BYTES], bases_room -= rows[BASE_BYTES], rests += rows[REST_BYTES], rests_room -= rows[REST_BYTES];
  }
  restore_arithmetic(before);
  free(decoded), free(room.numbers);
  return result;
}
