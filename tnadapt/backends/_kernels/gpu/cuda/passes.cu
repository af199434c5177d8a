// One pass of a Hadamard transform over memory, plain or with the draws of F, and the other kernels of F.
//
// A block processes a tile of rows and columns: contiguous if the stride is 1, otherwise rows a stride apart. The tile
// is in shared memory, where every 33rd word is padding, so that threads that read 16 neighbours each have no bank
// conflicts. Each step of up to four digits combines 2 to 16 points in registers. REAL is float or double. Loops run
// from threadIdx.x in steps of blockDim.x, so that any number of threads, even one, gives the same numbers.

enum Load { LOAD_PLAIN, LOAD_DIAGONAL, LOAD_PERMUTED, LOAD_UNPERMUTED };
enum Store { STORE_PLAIN, STORE_DIAGONAL };

constexpr int TILE = 32768 / sizeof(REAL);
constexpr int SIGN_WORDS = 1024;

__device__ inline int padded(int i) { return i + (i >> 5); }

// Maps points of a tile to elements of the array: to a vector, and to a position in it.
struct Place {
  i64 start;
  int log_length, log_stride, log_columns;

  __device__ i64 at(int i) const {  // element of point i of the tile in the whole array
    const i64 row = i >> log_columns, column = i & ((1 << log_columns) - 1);
    return start + (row << (log_stride ? log_stride : log_columns)) + column;
  }
  __device__ i64 vector(i64 e) const { return e >> log_length; }
  __device__ i64 position(i64 e) const { return e & (((i64)1 << log_length) - 1); }
};

__device__ inline Place place_of(i64 tile, int log_length, int log_stride, int log_rows, int log_columns) {
  i64 start = tile << (log_rows + log_columns);
  if (log_stride) {
    const int across = log_stride - log_columns;
    start = ((tile >> across) << (log_rows + log_stride)) + ((tile & (((i64)1 << across) - 1)) << log_columns);
  }
  return Place{start, log_length, log_stride, log_columns};
}

template <int BITS>
__device__ inline void step(REAL *tile, int points, int low) {
  constexpr int N = 1 << BITS;
  for (int t = threadIdx.x; t < points >> BITS; t += blockDim.x) {
    const int base = ((t >> low) << (low + BITS)) | (t & ((1 << low) - 1));
    REAL v[N];
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = tile[padded(base + (k << low))];
#pragma unroll
    for (int h = 1; h < N; h *= 2)
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (!(k & h)) {
          const REAL a = v[k], b = v[k + h];
          v[k] = a + b;
          v[k + h] = a - b;
        }
#pragma unroll
    for (int k = 0; k < N; ++k) tile[padded(base + (k << low))] = v[k];
  }
  __syncthreads();
}

__device__ inline void butterflies(REAL *tile, int points, int low, int bits) {
  for (; bits >= 4; bits -= 4, low += 4) step<4>(tile, points, low);
  if (bits == 3) step<3>(tile, points, low);
  if (bits == 2) step<2>(tile, points, low);
  if (bits == 1) step<1>(tile, points, low);
}

// Multiply a tile by normal numbers: one Philox block for every four neighbours, if a row has four.
__device__ inline void times_normals(REAL *tile, int points, const Place &place, u32 purpose, u32 group, u64 seed) {
  if (place.log_columns < 2) {
    for (int i = threadIdx.x; i < points; i += blockDim.x)
      tile[padded(i)] *= normal_of(word_at(place.position(place.at(i)), purpose, group, seed));
  } else {
    for (int i = 4 * threadIdx.x; i < points; i += 4 * blockDim.x) {
      const Block block = philox((u64)place.position(place.at(i)) >> 2, purpose, group, seed);
#pragma unroll
      for (int k = 0; k < 4; ++k) tile[padded(i + k)] *= normal_of(block.word[k]);
    }
  }
  __syncthreads();
}

// Multiply a tile by signs. Its rows are split into runs of at most 32 neighbours, whose signs are bits of one word.
// Each run computes one Philox block. There are several rounds if the buffer has fewer words than there are runs.
__device__ inline void times_signs(REAL *tile, u32 *words, int points, const Place &place, u32 group, u64 seed) {
  const int log_run = place.log_columns < 5 ? place.log_columns : 5, runs = points >> log_run;
  for (int done = 0; done < runs; done += SIGN_WORDS) {
    const int now = runs - done < SIGN_WORDS ? runs - done : SIGN_WORDS;
    for (int run = threadIdx.x; run < now; run += blockDim.x)
      words[run] = word_at(place.position(place.at((done + run) << log_run)) >> 5, 3, group, seed);
    __syncthreads();
    for (int t = threadIdx.x; t < now << log_run; t += blockDim.x) {
      const int i = (done << log_run) + t;
      if (words[t >> log_run] >> (place.position(place.at(i)) & 31) & 1) tile[padded(i)] = -tile[padded(i)];
    }
    __syncthreads();
  }
}

template <int LOAD, int STORE>
__device__ inline void pass(const REAL *x, REAL *out, i64 vectors, i64 n_in, i64 n_out, double scale, u32 group,
                            u64 seed, int signs, int log_length, int log_period, int log_stride, int bits, int log_rows,
                            int log_columns) {
  __shared__ REAL tile[TILE + TILE / 32];
  __shared__ u32 words[SIGN_WORDS];
  const Place place = place_of(blockIdx.x, log_length, log_stride, log_rows, log_columns);
  const int points = 1 << (log_rows + log_columns);
  const i64 period = (i64)1 << log_period;

  Network network;
  if (LOAD == LOAD_PERMUTED || LOAD == LOAD_UNPERMUTED) network = network_of(log_length, group, seed);
  for (int i = threadIdx.x; i < points; i += blockDim.x) {
    const i64 e = place.at(i), vector = place.vector(e), j = place.position(e);
    REAL value = 0;
    if (vector < vectors) {
      const REAL *row = x + vector * n_in;
      if (LOAD == LOAD_PERMUTED) {
        const i64 from = image<false>(network, j);
        value = row[from & (period - 1)] * (REAL)normal_of(word_at(from, 2, group, seed));
      } else if (LOAD == LOAD_UNPERMUTED) {
        value = row[image<true>(network, j)];
      } else if (j < n_in) {
        value = row[j];
      }
    }
    tile[padded(i)] = value;
  }
  __syncthreads();
  if (LOAD == LOAD_UNPERMUTED) times_normals(tile, points, place, 2, group, seed);
  if (LOAD == LOAD_DIAGONAL) {
    if (signs)
      times_signs(tile, words, points, place, group, seed);
    else
      times_normals(tile, points, place, 4, group, seed);
  }

  butterflies(tile, points, log_stride ? log_columns : 0, bits);

  if (STORE == STORE_DIAGONAL) {
    if (signs)
      times_signs(tile, words, points, place, group, seed);
    else
      times_normals(tile, points, place, 4, group, seed);
  }
  for (int i = threadIdx.x; i < points; i += blockDim.x) {
    const i64 e = place.at(i), vector = place.vector(e), j = place.position(e);
    if (vector < vectors && j < n_out) out[vector * n_out + j] = tile[padded(i)] * (REAL)scale;
  }
}

#define PASS(NAME, LOAD, STORE)                                                                                        \
  extern "C" __global__ void __launch_bounds__(512)                                                                    \
      NAME(const REAL *x, REAL *out, i64 vectors, i64 n_in, i64 n_out, double scale, u32 group, u64 seed, int signs,   \
           int log_length, int log_period, int log_stride, int bits, int log_rows, int log_columns) {                  \
    pass<LOAD, STORE>(x, out, vectors, n_in, n_out, scale, group, seed, signs, log_length, log_period, log_stride,     \
                      bits, log_rows, log_columns);                                                                    \
  }

PASS(pass_plain_plain, LOAD_PLAIN, STORE_PLAIN)
PASS(pass_plain_diagonal, LOAD_PLAIN, STORE_DIAGONAL)
PASS(pass_diagonal_plain, LOAD_DIAGONAL, STORE_PLAIN)
PASS(pass_permuted_plain, LOAD_PERMUTED, STORE_PLAIN)
PASS(pass_permuted_diagonal, LOAD_PERMUTED, STORE_DIAGONAL)
PASS(pass_unpermuted_plain, LOAD_UNPERMUTED, STORE_PLAIN)

// sums[vector, piece, q]: the sum of x[vector, inverse[p]] * g[p] over p = (piece * rows + row) * period + q, row after
// row, always in the same order. A thread computes four neighbours, or one if the period is shorter.
extern "C" __global__ void gathered_sum(const REAL *x, REAL *sums, i64 all, u32 group, u64 seed, int log_length,
                                        int log_period, int rows) {
  const i64 length = (i64)1 << log_length, period = (i64)1 << log_period, pieces = (length >> log_period) / rows;
  const int width = log_period < 2 ? 1 : 4;
  const Network network = network_of(log_length, group, seed);
  for (i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x; t * width < all; t += (i64)gridDim.x * blockDim.x) {
    const i64 q = t * width & (period - 1), piece = t * width >> log_period;  // piece: over all vectors
    const REAL *vector = x + piece / pieces * length;
    REAL total[4] = {0, 0, 0, 0};
    for (int row = 0; row < rows; ++row) {
      const i64 p = ((piece % pieces * rows + row) << log_period) + q;
      if (width == 1) {
        total[0] += vector[image<true>(network, p)] * (REAL)normal_of(word_at(p, 2, group, seed));
      } else {
        const Block block = philox((u64)p >> 2, 2, group, seed);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          total[k] += vector[image<true>(network, p + k)] * (REAL)normal_of(block.word[k]);
      }
    }
    sums[t * width] = total[0];
    if (width > 1)
#pragma unroll
      for (int k = 1; k < 4; ++k) sums[t * width + k] = total[k];
  }
}

// out[vector, j] = x[vector, perm[j]], or with the inverse permutation.
extern "C" __global__ void shuffle(const REAL *x, REAL *out, i64 all, i64 size, u32 group, u64 seed, int bits,
                                   int inverse) {
  const Network network = network_of(bits, group, seed);
  for (i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x; t < all; t += (i64)gridDim.x * blockDim.x) {
    const i64 j = t % size;
    const i64 from = inverse ? image_below<true>(network, j, size) : image_below<false>(network, j, size);
    out[t] = x[t - j + from];
  }
}
