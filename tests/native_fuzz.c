/* Round trips and broken bytes for the codecs in C, each buffer exactly as long as it is said to be: for a build with
 * AddressSanitizer, which ends the program at the first byte beyond one. Both variants must always agree.
 *
 *     native_fuzz SEED ROUNDS
 */
#include <stdio.h>

#include "lossy/piece.h"

int64_t cake_encode(int variant, int64_t count, int64_t *rows, uint8_t *bases, int64_t bases_room, uint8_t *rests, int64_t rests_room);
int64_t cake_decode(int variant, int near, int64_t count, const int64_t *rows);
int64_t cake_lossy_encode(int variant, int kind, int bits, int64_t size, const uint8_t *signs, int64_t tokens, int64_t count,
                          int64_t *rows, uint8_t *bases, int64_t bases_room, uint8_t *rests, int64_t rests_room);
int64_t cake_lossy_decode(int variant, int kind, int bits, int64_t size, const uint8_t *signs, int64_t tokens, int64_t count,
                          const int64_t *rows);

static uint64_t state;

static uint32_t next(uint32_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (uint32_t)(state >> 16) % below;
}

#define CHECK(true_here)                                                         \
  do {                                                                           \
    if (!(true_here)) {                                                          \
      fprintf(stderr, "round %d, line %d: %s\n", round_number, __LINE__, #true_here); \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

static int round_number;
static const uint8_t SIGNS[32] = {0xa5, 0x3c, 0x0f};

static uint8_t *copied(const uint8_t *from, int64_t nbytes) {
  uint8_t *to = malloc((size_t)nbytes);
  memcpy(to, from, (size_t)nbytes);
  return to;
}

/* Numbers of one kind: any bits, a few exponents around each channel's own, special values, all equal. */
static void fill(uint8_t *out, int64_t numbers, int64_t channels) {
  uint32_t kind = next(5), middle = next(256), spread = 1 + next(12), value = next(65536);
  for (int64_t i = 0; i < numbers; i++) {
    uint32_t exponent = (middle + (uint32_t)(i % channels) % 5 + next(spread)) & 255, bits = next(65536);
    if (kind == 1 || (kind == 2 && next(64))) bits = (bits & 0x807f) | exponent << 7;
    else if (kind == 3) bits = (uint32_t[]){0, 0x8000, 1, 0x807f, 0x7f80, 0xff80, 0x7fc0, 0x7f81}[next(8)];
    else if (kind == 4) bits = value;
    out[2 * i] = (uint8_t)bits, out[2 * i + 1] = (uint8_t)(bits >> 8);
  }
}

/* Decodes with both variants into a buffer of `nbytes`; returns the result, and the bytes in `*out`, to be freed. */
static int64_t decoded(int near, const uint8_t *base, int64_t base_bytes, const uint8_t *rest, int64_t rest_bytes, int64_t nbytes,
                       int64_t channels, uint8_t **out) {
  uint8_t *outs[2] = {calloc((size_t)nbytes + !nbytes, 1), calloc((size_t)nbytes + !nbytes, 1)};
  int64_t results[2];
  for (int v = 0; v < 2; v++) {
    int64_t row[7] = {(int64_t)(uintptr_t)base, base_bytes, (int64_t)(uintptr_t)rest, rest_bytes, (int64_t)(uintptr_t)outs[v], nbytes,
                      channels};
    results[v] = cake_decode(v ? AUTOMATIC : PORTABLE, near, 1, row);
  }
  CHECK(results[0] == results[1]);
  CHECK(results[0] || !memcmp(outs[0], outs[1], (size_t)nbytes));
  free(outs[1]);
  *out = outs[0];
  return results[0];
}

static void broken(const uint8_t *base, int64_t base_bytes, const uint8_t *rest, int64_t rest_bytes, int64_t nbytes, int64_t channels) {
  int64_t claimed = base_bytes, claimed_rest = rest_bytes, claimed_out = nbytes;
  if (next(3) == 0) claimed = next((uint32_t)(2 * base_bytes) + 1);
  if (next(6) == 0) claimed_rest = next((uint32_t)(2 * rest_bytes) + 1);
  if (next(6) == 0) claimed_out = next((uint32_t)(2 * nbytes) + 1);
  if (next(6) == 0) channels = (int64_t)next(400) - 10;
  uint8_t *bad = calloc((size_t)claimed + 1, 1), *bad_rest = calloc((size_t)claimed_rest + 1, 1), *out;
  memcpy(bad, base, (size_t)(claimed < base_bytes ? claimed : base_bytes));
  memcpy(bad_rest, rest, (size_t)(claimed_rest < rest_bytes ? claimed_rest : rest_bytes));
  for (uint32_t n = next(4); n && claimed; n--) bad[next((uint32_t)claimed)] = (uint8_t)next(256);
  if (next(4) == 0)
    for (int64_t i = 0; i < claimed; i++) bad[i] = (uint8_t)next(256);
  uint8_t *exact = copied(bad, claimed), *exact_rest = copied(bad_rest, claimed_rest);
  decoded((int)next(2), exact, claimed, exact_rest, claimed_rest, claimed_out, channels, &out);
  free(out), free(exact), free(exact_rest), free(bad), free(bad_rest);
}

/* A round of the lossless codec; returns whether its piece was encoded. */
static int lossless_round(void) {
  const int64_t channels = next(4) ? 1 + next(300) : 1 + next(4), tokens = 1 + next(40), nbytes = 2 * channels * tokens;
  const int64_t rest_room = (nbytes / 2 + 255) / 256 * 96;
  uint8_t *in = malloc((size_t)nbytes), *bases[2], *rests[2], *out;
  fill(in, nbytes / 2, channels);
  int64_t rows[2][5];
  for (int v = 0; v < 2; v++) {
    bases[v] = calloc((size_t)nbytes, 1), rests[v] = calloc((size_t)rest_room, 1);
    memcpy(rows[v], (int64_t[5]){(int64_t)(uintptr_t)in, nbytes, channels, 0, 0}, sizeof rows[v]);
    CHECK(cake_encode(v ? AUTOMATIC : PORTABLE, 1, rows[v], bases[v], nbytes, rests[v], rest_room) == 0);
  }
  const int64_t base_bytes = rows[0][3], rest_bytes = rows[0][4];
  CHECK(base_bytes == rows[1][3] && rest_bytes == rows[1][4] && base_bytes + rest_bytes <= nbytes);
  CHECK(!memcmp(bases[0], bases[1], (size_t)base_bytes) && !memcmp(rests[0], rests[1], (size_t)rest_bytes));
  uint8_t *base = copied(bases[0], base_bytes), *rest = copied(rests[0], rest_bytes);
  CHECK(decoded(0, base, base_bytes, rest, rest_bytes, nbytes, rest_bytes ? channels : 0, &out) == 0);
  CHECK(!memcmp(in, out, (size_t)nbytes));
  free(out);
  CHECK(decoded(1, base, base_bytes, rest, rest_bytes, nbytes, rest_bytes ? channels : 0, &out) == 0);
  free(out);
  for (int n = 0; rest_bytes && n < 8; n++) broken(base, base_bytes, rest, rest_bytes, nbytes, channels);
  for (int v = 0; v < 2; v++) free(bases[v]), free(rests[v]);
  free(in), free(base), free(rest);
  return rest_bytes > 0;
}

typedef struct {
  int kind, bits;
  int64_t size, tokens, row[5];  /* the shape: dtype, whether it has values, heads, head_dim, bytes */
} Lossy;

/* Decodes with both variants into a buffer of the piece's bytes, to be freed; returns the result. */
static int64_t lossy_decoded(const Lossy *one, const uint8_t *base, int64_t base_bytes, const uint8_t *rest, int64_t rest_bytes,
                             uint8_t **out) {
  const size_t nbytes = (size_t)one->row[4];
  uint8_t *outs[2] = {calloc(nbytes + !nbytes, 1), calloc(nbytes + !nbytes, 1)};
  int64_t results[2];
  for (int v = 0; v < 2; v++) {
    int64_t row[10] = {0, 0, 0, 0, 0, (int64_t)(uintptr_t)outs[v], (int64_t)(uintptr_t)base, base_bytes, (int64_t)(uintptr_t)rest,
                       rest_bytes};
    memcpy(row, one->row, sizeof one->row);
    results[v] = cake_lossy_decode(v ? AUTOMATIC : PORTABLE, one->kind, one->bits, one->size, SIGNS, one->tokens, 1, row);
  }
  CHECK(results[0] == results[1]);
  CHECK(results[0] || !memcmp(outs[0], outs[1], nbytes));
  free(outs[1]);
  *out = outs[0];
  return results[0];
}

/* Encoded bytes, sizes and shapes that no encoder makes. Infinities and NaN may come out, whose signs are not defined. */
static void lossy_broken(Lossy one, const uint8_t *base, int64_t base_bytes, const uint8_t *rest, int64_t rest_bytes) {
  int64_t claimed = next(3) ? base_bytes : next((uint32_t)(2 * base_bytes) + 1);
  int64_t claimed_rest = next(6) ? rest_bytes : next((uint32_t)(2 * rest_bytes) + 9);
  if (next(4) == 0) one.row[next(5)] = (int64_t)next(600) - 20;
  if (next(6) == 0) one.tokens = (int64_t)next(60) - 5;
  if (next(6) == 0) one.kind = (int)next(5) - 1, one.bits = (int)next(10), one.size = (int64_t)next(70) - 3;
  if (one.row[4] < 0) one.row[4] = 0;
  uint8_t *bad = calloc((size_t)claimed + !claimed, 1), *bad_rest = calloc((size_t)claimed_rest + !claimed_rest, 1), *out;
  memcpy(bad, base, (size_t)(claimed < base_bytes ? claimed : base_bytes));
  memcpy(bad_rest, rest, (size_t)(claimed_rest < rest_bytes ? claimed_rest : rest_bytes));
  for (uint32_t n = next(4); n && claimed > 2; n--) bad[2 + next((uint32_t)claimed - 2)] &= (uint8_t)next(128);
  lossy_decoded(&one, bad, claimed, bad_rest, claimed_rest, &out);
  free(out), free(bad), free(bad_rest);
}

/* A round of a lossy codec; returns whether its piece was encoded. */
static int lossy_round(void) {
  static const struct { int kind, bits, size; } schemes[] = {
      {GROUPED, 8, 0}, {GROUPED, 4, 32}, {GROUPED, 2, 32}, {LAYERED, 4, 32}, {ROTATED, 4, 0}};
  const uint32_t which = next(5);
  const int dtype = 1 + (int)next(3), item = dtype == FLOAT32 ? 4 : 2;
  const int64_t tokens = 1 + next(70), heads = 1 + next(3), dim = 1 + next(next(2) ? 70 : 8), nbytes = item * tokens * heads * dim;
  Lossy one = {schemes[which].kind, schemes[which].bits, schemes[which].size, tokens, {dtype, next(2), heads, dim, nbytes}};
  const int64_t rest_room = one.kind == LAYERED ? (nbytes / item + 1) / 2 : 0;
  uint8_t *ins[2], *bases[2], *rests[2], *out;
  ins[0] = malloc((size_t)nbytes);
  fill(ins[0], nbytes / 2, heads * dim);
  if (dtype == FLOAT16 && next(4)) for (int64_t i = 1; i < nbytes; i += 2) ins[0][i] &= 0xbf;  /* finite */
  ins[1] = copied(ins[0], nbytes);
  int64_t rows[2][8] = {{0}};
  for (int v = 0; v < 2; v++) {
    bases[v] = calloc((size_t)nbytes, 1), rests[v] = calloc((size_t)rest_room + !rest_room, 1);
    memcpy(rows[v], one.row, sizeof one.row);
    rows[v][5] = (int64_t)(uintptr_t)ins[v];
    CHECK(cake_lossy_encode(v ? AUTOMATIC : PORTABLE, one.kind, one.bits, one.size, SIGNS,
                            tokens, 1, rows[v], bases[v], nbytes, rests[v], rest_room) == 0);
  }
  const int64_t base_bytes = rows[0][6], rest_bytes = rows[0][7];
  CHECK(base_bytes == rows[1][6] && rest_bytes == rows[1][7] && base_bytes + rest_bytes <= nbytes);
  CHECK(!memcmp(bases[0], bases[1], (size_t)base_bytes) && !memcmp(rests[0], rests[1], (size_t)rest_bytes));
  CHECK(!memcmp(ins[0], ins[1], (size_t)nbytes));
  uint8_t *base = copied(bases[0], base_bytes), *rest = copied(rests[0], rest_bytes);
  const int encoded = base_bytes < nbytes;
  if (!encoded) one.row[0] = WHOLE;
  CHECK(lossy_decoded(&one, base, base_bytes, rest, rest_bytes, &out) == 0);
  CHECK(!memcmp(ins[0], out, (size_t)nbytes));
  free(out);
  for (int n = 0; encoded && n < 8; n++) lossy_broken(one, base, base_bytes, rest, rest_bytes);
  for (int v = 0; v < 2; v++) free(ins[v]), free(bases[v]), free(rests[v]);
  free(base), free(rest);
  return encoded;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  state = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
  int encoded = 0, lossy = 0;
  for (round_number = 0; round_number < atoi(argv[2]); round_number++) encoded += lossless_round(), lossy += lossy_round();
  printf("%d %d of %s encoded\n", encoded, lossy, argv[2]);
  return 0;
}
