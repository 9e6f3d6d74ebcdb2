// Choosing tokens from logits without sorting them: one pass finds the best logit, one adds up counts and
// weights by distance from it; then one block a row looks only at the few tokens that decide
// (sampling_search.cuh).
#include <climits>

#include "services/attention_gpu/backend/cuda/sampling_rows.cuh"
#include "services/attention_gpu/backend/cuda/sampling_search.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;

static_assert(kSamplingParts * kMostTopLogprobs <= kFew);

// The share of a row that belongs to this block.
struct Part {
  int begin, end;
};
__device__ __forceinline__ Part MyPart(int vocab) {
  const int parts = gridDim.x, size = ((vocab + parts - 1) / parts + 3) / 4 * 4;
  const int begin = static_cast<int>(blockIdx.x) * size;
  return {min(begin, vocab), min(begin + size, vocab)};
}

// True in the last of a row's blocks to come here, once all others' writes before can be seen.
__device__ __forceinline__ bool IsLastBlock(uint32_t* finished) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    if (last) *finished = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <int kThreadsOfBlock>
__device__ __forceinline__ Key BestOfRow(const Key* parts, int count) {
  Key best = kNoKey;
  for (int i = threadIdx.x; i < count; i += kThreadsOfBlock) best = Smaller()(best, __ldcg(parts + i));
  return BlockReduce<kThreadsOfBlock>(best, Smaller());
}

// The distribution before any change: what log-probabilities need of this part of the row.
__device__ void RawStatistics(const SamplingState& s, const float* logits, int row, const Part& part,
                              int tops) {
  float largest = -INFINITY;
  Key mine = kNoKey;
  ForEach<kThreads>(logits, part.begin, part.end, [&](float l, int token) {
    largest = fmaxf(largest, l);
    mine = Smaller()(mine, KeyOf(l, token));
  });
  largest = BlockReduce<kThreads>(largest, Larger());
  double sum = 0;
  if (isfinite(largest)) {
    ForEach<kThreads>(logits, part.begin, part.end, [&](float l, int) {
      const double distance = static_cast<double>(largest) - static_cast<double>(l);
      sum += distance > kFar ? static_cast<double>(expf(-static_cast<float>(distance))) : exp(-distance);
    });
  }
  sum = BlockReduce<kThreads>(sum, Sum());
  const int64_t at = int64_t{row} * kSamplingParts + blockIdx.x;
  if (threadIdx.x == 0) {
    s.raw_max[at] = largest;
    s.raw_sum[at] = sum;
  }
  for (int i = 0; i < tops; ++i) {
    const Key best = BlockReduce<kThreads>(mine, Smaller());
    if (threadIdx.x == 0) s.raw_top[at * kMostTopLogprobs + i] = best;
    if (mine == best && best != kNoKey) {  // the next of this thread's own
      mine = kNoKey;
      ForEach<kThreads>(logits, part.begin, part.end, [&](float l, int token) {
        const Key k = KeyOf(l, token);
        if (k > best) mine = Smaller()(mine, k);
      });
    }
  }
}

__device__ __forceinline__ SamplingEdit LoadEdit(const SamplingEdit* edit) {
  const int2 words = __ldcv(reinterpret_cast<const int2*>(edit));
  SamplingEdit e;
  e.token = words.x;
  e.count = words.y;
  return e;
}

// Biases, then penalties, in float32 as Sample() has them; keeps what was there before.
__device__ void ApplyEdits(const SamplingInput& input, const SamplingRow& r, float* logits) {
  const SamplingEdit* edits = input.edits + r.first_edit;
  RawLogit* raw = input.raw + r.first_edit;
  for (int i = threadIdx.x; i < r.biases; i += kThreads) {
    const int token = LoadEdit(edits + i).token;
    if (i > 0 && LoadEdit(edits + i - 1).token == token) {  // the thread of the first one does them all
      raw[i] = {-1, 0};
      continue;
    }
    float l = Clean(logits[token]);
    raw[i] = {token, l};
    for (int j = i; j < r.biases; ++j) {
      const SamplingEdit e = LoadEdit(edits + j);
      if (e.token != token) break;
      l = __fadd_rn(l, e.bias);
    }
    logits[token] = l;
  }
  __syncthreads();
  edits += r.biases;
  raw += r.biases;
  constexpr int kAhead = 4;  // the edits come over the bus
  for (int first = threadIdx.x; first < r.penalties; first += kAhead * kThreads) {
    SamplingEdit e[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * kThreads < r.penalties) e[u] = LoadEdit(edits + first + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * kThreads >= r.penalties) break;
      float l = Clean(logits[e[u].token]);
      raw[first + u * kThreads] = {e[u].token, l};
      if (r.repetition != 1.0f) l = l > 0.0f ? __fdiv_rn(l, r.repetition) : __fmul_rn(l, r.repetition);
      const float count = static_cast<float>(e[u].count);
      l = __fsub_rn(l, __fadd_rn(r.presence, __fmul_rn(r.frequency, count)));
      logits[e[u].token] = l;
    }
  }
}

constexpr int kInputWords = sizeof(SamplingInput) / sizeof(int4);
static_assert(kInputWords * sizeof(int4) == sizeof(SamplingInput));

// One block: many that read the same page-locked memory wait for each other.
__global__ void Fetch(const SamplingState s) {
  for (int i = threadIdx.x; i < kInputWords; i += blockDim.x) {
    reinterpret_cast<int4*>(s.fetched)[i] = __ldcv(reinterpret_cast<const int4*>(s.input) + i);
  }
}

// Forms what log-probabilities need, then changes the logits.
__global__ void __launch_bounds__(kThreads) Prepare(const SamplingState s, float* all_logits, int vocab) {
  const int row = blockIdx.y;
  const SamplingRow& r = s.fetched->rows[row];
  if (r.flags & kSamplingIdle) return;
  float* logits = all_logits + int64_t{row} * vocab;
  const bool edits = r.biases + r.penalties > 0;
  if (r.flags & kSamplingLogprobs) {
    RawStatistics(s, logits, row, MyPart(vocab), r.top_logprobs);
    if (!edits || !IsLastBlock(s.finished + row)) return;
  } else if (!edits || blockIdx.x != 0) {
    return;
  }
  ApplyEdits(*s.fetched, r, logits);
}

// The best token of each part, and empty bins for the next kernel.
__global__ void __launch_bounds__(kThreads) FindBest(const SamplingState s, const float* logits, int vocab) {
  const int row = blockIdx.y;
  const uint32_t flags = s.fetched->rows[row].flags;
  if (flags & kSamplingIdle) return;
  if ((flags & kSamplingGreedy) == 0) {
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < kBins; i += gridDim.x * kThreads) {
      s.bin_count[row * kBins + i] = 0;
      s.bin_weight[row * kBins + i] = 0;
    }
  }
  const Part part = MyPart(vocab);
  Key best = kNoKey;
  ForEach<kThreads>(logits + int64_t{row} * vocab, part.begin, part.end,
                    [&](float l, int token) { best = Smaller()(best, KeyOf(l, token)); });
  best = BlockReduce<kThreads>(best, Smaller());
  if (threadIdx.x == 0) s.best[row * kSamplingParts + blockIdx.x] = best;
}

__global__ void __launch_bounds__(kThreads)
    FindBestAlone(const SamplingState s, const float* logits, int vocab) {
  const int row = blockIdx.y;
  const Part part = MyPart(vocab);
  Key best = kNoKey;
  ForEach<kThreads>(logits + int64_t{row} * vocab, part.begin, part.end,
                    [&](float l, int token) { best = Smaller()(best, KeyOf(l, token)); });
  best = BlockReduce<kThreads>(best, Smaller());
  if (threadIdx.x == 0) s.best[row * kSamplingParts + blockIdx.x] = best;
  if (!IsLastBlock(s.finished + row)) return;
  best = BestOfRow<kThreads>(s.best + row * kSamplingParts, gridDim.x);
  if (threadIdx.x == 0) s.tokens[row] = s.results[row].token = TokenOf(best);
}

// Counts and weights by distance from the best.
__global__ void __launch_bounds__(kThreads) FillBins(const SamplingState s, const float* logits, int vocab) {
  __shared__ uint32_t count[kBins];
  __shared__ Key weight[kBins];
  const int row = blockIdx.y;
  const SamplingRow& r = s.fetched->rows[row];
  if (r.flags & (kSamplingIdle | kSamplingGreedy)) return;
  const float best = LogitOf(BestOfRow<kThreads>(s.best + row * kSamplingParts, gridDim.x));
  if (!isfinite(best)) return;
  const Weights weights{best, r.inverse_temperature};
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    count[i] = 0;
    weight[i] = 0;
  }
  __syncthreads();
  const Part part = MyPart(vocab);
  uint32_t far_count = 0;  // of the last bin, where most tokens may be
  Key far_weight = 0;
  ForEach<kThreads>(logits + int64_t{row} * vocab, part.begin, part.end, [&](float l, int) {
    const int bin = weights.Bin(l);
    const Key w = weights.Fixed(l);
    if (bin == kBins - 1) {
      ++far_count;
      far_weight += w;
    } else {
      atomicAdd(count + bin, 1u);
      if (w != 0) atomicAdd(weight + bin, w);
    }
  });
  far_count = BlockReduce<kThreads>(far_count, Sum());
  far_weight = BlockReduce<kThreads>(far_weight, Sum());
  if (threadIdx.x == 0) {
    count[kBins - 1] = far_count;
    weight[kBins - 1] = far_weight;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (count[i] != 0) atomicAdd(s.bin_count + row * kBins + i, count[i]);
    if (weight[i] != 0) atomicAdd(s.bin_weight + row * kBins + i, weight[i]);
  }
}

// The log-probabilities of `token` and of the likeliest ones, of the distribution before any change.
__device__ void WriteLogprobs(const SamplingState& state, const SamplingRow& r, int row, int parts, int token,
                              const float* logits, ChooseShared& s) {
  const int64_t first = int64_t{row} * kSamplingParts;
  const int t = threadIdx.x;
  const float mine = t < parts ? state.raw_max[first + t] : -INFINITY;
  const float largest = BlockReduce<kChooseThreads>(mine, Larger());
  double log_sum = largest;
  if (isfinite(largest)) {
    double part = 0;
    if (t < parts) part = state.raw_sum[first + t] * exp(static_cast<double>(mine) - largest);
    log_sum = largest + log(BlockReduce<kChooseThreads>(part, Sum()));
  }
  SamplingResult& result = state.results[row];
  const int n = parts * r.top_logprobs;
  for (int i = t; i < n; i += kChooseThreads) {
    s.keys[i] = state.raw_top[(first + i / r.top_logprobs) * kMostTopLogprobs + i % r.top_logprobs];
  }
  if (n > 0) SortKeys<kChooseThreads>(s.keys, n);
  if (t < r.top_logprobs) {
    result.top_tokens[t] = TokenOf(s.keys[t]);
    result.top_logprobs[t] = static_cast<float>(static_cast<double>(LogitOf(s.keys[t])) - log_sum);
  }
  // What the token's logit was before the first of its edits.
  const int edits = r.biases + r.penalties;
  const RawLogit* raw = nullptr;
  int found = INT_MAX;
  if (edits > 0) {
    raw = state.fetched->raw + r.first_edit;
    for (int i = t; i < edits; i += kChooseThreads) {
      if (raw[i].token == token) found = min(found, i);
    }
    found = BlockReduce<kChooseThreads>(found, Smaller());
  }
  if (t == 0) {
    const float logit = found < edits ? raw[found].logit : Clean(logits[token]);
    result.logprob = static_cast<float>(static_cast<double>(logit) - log_sum);
  }
}

// A block a row.
__global__ void __launch_bounds__(kChooseThreads)
    Choose(const SamplingState state, const float* all_logits, int vocab, int parts) {
  __shared__ ChooseShared s;
  const int row = blockIdx.x;
  const SamplingRow r = state.fetched->rows[row];
  if (r.flags & kSamplingIdle) return;
  const float* logits = all_logits + int64_t{row} * vocab;
  const Key best = BestOfRow<kChooseThreads>(state.best + row * kSamplingParts, parts);
  int token = TokenOf(best);
  if ((r.flags & kSamplingGreedy) == 0 && isfinite(LogitOf(best))) {
    const int i = threadIdx.x;
    s.count[i] = BlockPrefix<kChooseThreads>(state.bin_count[row * kBins + i]).inclusive;
    s.weight[i] = BlockPrefix<kChooseThreads>(state.bin_weight[row * kBins + i]).inclusive;
    __syncthreads();
    RowSearch search{s, logits, vocab, {LogitOf(best), r.inverse_temperature}};
    token = search.Draw(r);
  }
  __syncthreads();
  if (threadIdx.x == 0) state.tokens[row] = state.results[row].token = token;
  if (r.flags & kSamplingLogprobs) WriteLogprobs(state, r, row, parts, token, logits, s);
}

// Blocks that share a row: enough for one row to use the memory's bandwidth, few where rows are many.
int PartsOf(int64_t rows) {
  const auto parts = static_cast<int>(256 / rows);
  return parts > kSamplingParts ? kSamplingParts : parts < 8 ? 8 : parts;
}

bool InRange(int64_t rows, int64_t vocab) {
  return rows <= kSamplingRows && vocab > 0 && vocab <= kMostSamplingVocab;
}

}  // namespace

cudaError_t LaunchSampling(const SamplingState& s, float* logits, int64_t rows, int64_t vocab,
                           cudaStream_t stream) {
  if (rows <= 0) return cudaSuccess;
  if (!InRange(rows, vocab)) return cudaErrorInvalidValue;
  const int n = static_cast<int>(vocab), parts = PartsOf(rows);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(rows));
  Fetch<<<1, (kInputWords + 31) / 32 * 32, 0, stream>>>(s);
  Prepare<<<grid, kThreads, 0, stream>>>(s, logits, n);
  FindBest<<<grid, kThreads, 0, stream>>>(s, logits, n);
  FillBins<<<grid, kThreads, 0, stream>>>(s, logits, n);
  Choose<<<static_cast<unsigned>(rows), kChooseThreads, 0, stream>>>(s, logits, n, parts);
  return cudaGetLastError();
}

cudaError_t LaunchGreedySampling(const SamplingState& s, const float* logits, int64_t rows, int64_t vocab,
                                 cudaStream_t stream) {
  if (rows <= 0) return cudaSuccess;
  if (!InRange(rows, vocab)) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(PartsOf(rows)), static_cast<unsigned>(rows));
  FindBestAlone<<<grid, kThreads, 0, stream>>>(s, logits, static_cast<int>(vocab));
  return cudaGetLastError();
}

}  // namespace tandem::attention::cuda
