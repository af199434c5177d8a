// Element-wise random draws; tnadapt.algebra.rng is the reference implementation.
//
// Integers are exact, and every operation in double precision is rounded separately: compile without fused
// multiply-adds (-fmad=false), which would change the last bits.

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct Block {
  u32 word[4];
};

// Philox4x32-10 of the counter (lo32(block), hi32(block), purpose, group).
__device__ inline Block philox(u64 block, u32 purpose, u32 group, u64 seed) {
  u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = purpose, c3 = group;
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
    c1 = (u32)p1;
    c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
    c3 = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Block{{c0, c1, c2, c3}};
}

// A word of a stream at any position; computes a whole block.
__device__ inline u32 word_at(i64 index, u32 purpose, u32 group, u64 seed) {
  const Block block = philox((u64)index >> 2, purpose, group, seed);
  const u32 low = index & 1 ? block.word[1] : block.word[0], high = index & 1 ? block.word[3] : block.word[2];
  return index & 2 ? high : low;
}

__device__ inline double horner(double x, double c0, double c1, double c2, double c3, double c4, double c5, double c6,
                                double c7) {
  return ((((((c0 * x + c1) * x + c2) * x + c3) * x + c4) * x + c5) * x + c6) * x + c7;
}

// Natural logarithm of a normal floating-point number, by the series of tnadapt.algebra.rng.
__device__ inline double log_of(double x) {
  const i64 bits = __double_as_longlong(x);
  double mantissa = __longlong_as_double((bits & 0xFFFFFFFFFFFFFLL) | 0x3FE0000000000000LL);
  i64 exponent = (bits >> 52) - 1022;
  if (mantissa < 0.7071067811865476) {
    mantissa = mantissa * 2.0;
    exponent -= 1;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = horner(square, 1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11);
  series = ((((series * square + 1.0 / 9) * square + 1.0 / 7) * square + 1.0 / 5) * square + 1.0 / 3) * square + 1.0;
  return (double)exponent * 0.6931471805599453 + 2.0 * s * series;
}

// Standard normal number from a word: AS 241, rounded to single precision once, at the end.
__device__ inline float normal_of(u32 word) {
  const double u = ((double)word + 0.5) * 2.3283064365386963e-10, q = u - 0.5;
  if (fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return (float)(q *
                   horner(r, 2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
                          4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
                          1.3314166789178437745e2, 3.3871328727963666080e0) /
                   horner(r, 5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
                          2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
                          4.2313330701600911252e1, 1.0));
  }
  const double r = sqrt(-log_of(q < 0.0 ? u : 1.0 - u)) - 1.6;
  const double tail =
      horner(r, 7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
             1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0,
             1.42343711074968357734e0) /
      horner(r, 1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
             1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0,
             1.0);
  return (float)(q < 0.0 ? -tail : tail);
}

// A permutation of 2**bits positions: a Feistel network whose eight keys are the first words of its stream.
struct Network {
  u32 key[8];
  u32 low_mask, high_mask;
  int low;
};

__device__ inline Network network_of(int bits, u32 group, u64 seed) {
  Network network;
  for (int half = 0; half < 2; ++half) {
    const Block block = philox(half, 1, group, seed);
    for (int i = 0; i < 4; ++i) network.key[4 * half + i] = block.word[i];
  }
  network.low = bits / 2;
  network.low_mask = (u32)((1ull << network.low) - 1);
  network.high_mask = (u32)((1ull << (bits - network.low)) - 1);
  return network;
}

__device__ inline u32 mix(u32 x, u32 key) {
  x = (x ^ key) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

template <bool INVERSE>
__device__ inline i64 image(const Network &network, i64 x) {
  u32 lo = (u32)x & network.low_mask, hi = (u32)(x >> network.low);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int round = INVERSE ? 7 - i : i;
    if (round % 2 == 0)
      hi ^= mix(lo, network.key[round]) & network.high_mask;
    else
      lo ^= mix(hi, network.key[round]) & network.low_mask;
  }
  return ((i64)hi << network.low) | lo;
}

// A permutation of size positions, 2**(bits - 1) < size <= 2**bits, by cycle walking: an image of size or more is
// permuted again until it is below size.
template <bool INVERSE>
__device__ inline i64 image_below(const Network &network, i64 x, i64 size) {
  do x = image<INVERSE>(network, x);
  while (x >= size);
  return x;
}
