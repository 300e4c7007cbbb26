/* What the schemes of the lossy codecs work on. */
#ifndef CAKE_PIECE_H
#define CAKE_PIECE_H

#include "numbers.h"

enum { GROUPED, LAYERED, ROTATED };             /* schemes: integers.py, quantspec.py, rotation.py */
enum { TOP = 14, SMALLEST = -80, LARGEST = 127 };  /* exponents, see scales.py */
enum { ROWS = 8, VECTORS = 16 };                /* rows whose codes begin with a byte; vectors that are rotated at once */

typedef struct {
  int scheme, bits;
  int64_t size;         /* tokens of a group of keys, channels of one of values; 0: all tokens, one head's channels */
  const uint8_t *signs; /* of a rotation: 256 bits, which are repeated */
} Scheme;

typedef struct {
  int dtype, values;
  int64_t tokens, heads, head_dim, channels, numbers, nbytes;
  int64_t rows, width;         /* of the piece as a table: groups of keys are parts of its columns, groups of values of its rows */
  int64_t size, per_row;       /* numbers of a group; groups of values in a row, 0 of keys */
  int64_t scales;              /* float16 numbers before the codes */
  int64_t base_bytes, rest_bytes;  /* when it is encoded */
} Piece;

typedef struct {               /* memory for one row or tile, of any piece of the chunk */
  float *numbers, *least, *most, *step, *lowest, *turned, *squares;
  uint8_t *codes, *lower;
} Room;

#endif
