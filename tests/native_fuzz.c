/* Round trips and broken bytes for the lossless codec, each buffer exactly as long as it is said to be: for a build with
 * AddressSanitizer, which ends the program at the first byte beyond one. Both variants must always agree.
 *
 *     native_fuzz SEED ROUNDS
 */
#include <stdio.h>

#include "lossless.c"

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

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  state = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
  int encoded = 0;
  for (round_number = 0; round_number < atoi(argv[2]); round_number++) {
    const int64_t channels = next(4) ? 1 + next(300) : 1 + next(4), tokens = 1 + next(40), nbytes = 2 * channels * tokens;
    const int64_t rest_room = rest_size(nbytes / 2);
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
    if (rest_bytes) {
      encoded++;
      for (int n = 0; n < 8; n++) broken(base, base_bytes, rest, rest_bytes, nbytes, channels);
    }
    for (int v = 0; v < 2; v++) free(bases[v]), free(rests[v]);
    free(in), free(base), free(rest);
  }
  printf("%d of %s encoded\n", encoded, argv[2]);
  return 0;
}
