// Enough of CUDA for a C++ compiler: the threads of a block are threads, and blocks run one after another.
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
  unsigned x;
};
static Index blockIdx, blockDim, gridDim;
static thread_local Index threadIdx;

static std::mutex mutex;
static std::condition_variable all_are_here;
static unsigned here = 0, round_of_barrier = 0;

static void __syncthreads() {
  std::unique_lock<std::mutex> lock(mutex);
  const unsigned round = round_of_barrier;
  if (++here == blockDim.x) {
    here = 0;
    ++round_of_barrier;
    all_are_here.notify_all();
  } else {
    all_are_here.wait(lock, [round] { return round != round_of_barrier; });
  }
}

static long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

static double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

extern "C" void begin_block(unsigned block, unsigned blocks, unsigned threads) {
  blockIdx.x = block;
  gridDim.x = blocks;
  blockDim.x = threads;
}

extern "C" void begin_thread(unsigned thread) { threadIdx.x = thread; }
