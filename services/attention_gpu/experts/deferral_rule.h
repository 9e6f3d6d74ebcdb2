// Which of a token's experts wait in expert deferral (deferral.h): one definition for the CPU and for the
// GPU. Read by the host compiler and by nvcc.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TANDEM_DEFERRAL_RULE __host__ __device__ inline
#else
#define TANDEM_DEFERRAL_RULE inline
#endif

namespace tandem::attention {

// Whether expert `j` of the `k` of a token is among the `deferred` ones with the smallest weights; of equal
// weights those later in the router's order.
TANDEM_DEFERRAL_RULE bool IsDeferred(const float* weights, int32_t k, int32_t j, int32_t deferred) {
  int32_t ahead = 0;
  for (int32_t i = 0; i < k; ++i) {
    if (weights[i] > weights[j] || (weights[i] == weights[j] && i < j)) ++ahead;
  }
  return ahead >= k - deferred;
}

}  // namespace tandem::attention
