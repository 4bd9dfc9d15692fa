// The emulator itself: what it computes, and that it finds what CUDA leaves undefined.
#include <doctest/doctest.h>

#include <set>
#include <string>
#include <vector>

#include "simt/cuda_runtime.h"

namespace {

struct Sum {
  const float* values;
  float* sums;
  unsigned* blocks_done;
  float* total;
};

// A block adds 64 values by shuffles and shared memory; the last block adds up the blocks.
void sum_kernel(Sum sum) {
  auto* const warps = static_cast<float*>(simt::dynamic_shared());
  float x = sum.values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum.sums[blockIdx.x] = warps[0] + warps[1];
  if (atomicAdd(sum.blocks_done, 1u) + 1 == gridDim.x)
    for (unsigned b = 0; b < gridDim.x; ++b) *sum.total += sum.sums[b];
}

void without_barrier(int* seen) {
  auto* const shared = static_cast<int*>(simt::dynamic_shared());
  shared[threadIdx.x] = 1;
  seen[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
void two_barriers(int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
void ends_early(int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
void dead_lane(int) {
  if (threadIdx.x % 32 == 7) return;
  __syncwarp();
}
void divergent_shuffle(int) {
  if (threadIdx.x % 2)
    (void)__shfl_xor_sync(0xffffffffu, 1, 1);
  else
    (void)__ballot_sync(0xffffffffu, true);
}
void block_order(std::vector<unsigned>* order) {
  if (threadIdx.x == 0) order->push_back(blockIdx.x);
}
void votes(int* result) {
  result[threadIdx.x] = __syncthreads_or(threadIdx.x == 40);
  result[threadIdx.x] += 2 * __popc(__ballot_sync(0xffffffffu, threadIdx.x % 4 == 0));
  result[threadIdx.x] += 100 * __syncthreads_or(0);
}

template <class Argument>
std::string error_of(void (*kernel)(Argument), Argument argument) {
  try {
    simt::launch(kernel, dim3(2), dim3(64), 256, argument);
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

struct EverySchedule {
  ~EverySchedule() { simt::schedule() = {}; }
  template <class Check>
  void operator()(Check check) {
    for (unsigned seed = 0; seed < 8; ++seed)
      for (const unsigned blocks : {1u, 3u}) {
        simt::schedule() = {seed, blocks};
        check();
      }
  }
};

}  // namespace

TEST_CASE("shuffles, shared memory, atomics and the last block") {
  EverySchedule{}([] {
    std::vector<float> values(10 * 64, 1.0f), sums(10);
    unsigned blocks_done = 0;
    float total = 0.0f;
    simt::launch(sum_kernel, dim3(10), dim3(64), 2 * sizeof(float),
                 Sum{values.data(), sums.data(), &blocks_done, &total});
    CHECK(total == 640.0f);
  });
}

TEST_CASE("votes") {
  std::vector<int> result(64);
  simt::launch(votes, dim3(1), dim3(64), 0, result.data());
  CHECK(result == std::vector<int>(64, 1 + 2 * 8));
}

TEST_CASE("a missing barrier shows in some order of the threads") {
  bool wrong = false;
  EverySchedule{}([&] {
    std::vector<int> seen(64);
    simt::launch(without_barrier, dim3(1), dim3(64), 64 * sizeof(int), seen.data());
    for (const int value : seen) wrong = wrong || value != 1;
  });
  CHECK(wrong);
}

TEST_CASE("seeds change the order of the blocks") {
  std::set<std::vector<unsigned>> orders;
  EverySchedule{}([&] {
    std::vector<unsigned> order;
    simt::launch(block_order, dim3(6), dim3(32), 0, &order);
    CHECK(order.size() == 6);
    orders.insert(order);
  });
  CHECK(orders.size() > 4);
}

TEST_CASE("what is undefined is an error that names the place") {
  EverySchedule{}([] {
    CHECK(error_of(two_barriers, 0).find("test_simt.cpp:") != std::string::npos);
    CHECK(error_of(two_barriers, 0).find("while others wait") != std::string::npos);
    CHECK(error_of(ends_early, 0).find(" end") != std::string::npos);
    CHECK(error_of(ends_early, 0).find("block ") != std::string::npos);
    CHECK(error_of(dead_lane, 0) != "");
    CHECK(error_of(divergent_shuffle, 0).find("lanes of its warp wait") != std::string::npos);
  });
  // The emulator goes on after errors.
  std::vector<int> result(64);
  simt::launch(votes, dim3(1), dim3(64), 0, result.data());
  CHECK(result[0] == 17);
}

TEST_CASE("a launch that no device takes") {
  CHECK_THROWS_AS(simt::launch(votes, dim3(1), dim3(33), 0, static_cast<int*>(nullptr)),
                  simt::Error);
  CHECK_THROWS_AS(simt::launch(votes, dim3(0), dim3(32), 0, static_cast<int*>(nullptr)),
                  simt::Error);
}
