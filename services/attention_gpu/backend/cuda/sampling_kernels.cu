// Choosing tokens from logits without sorting them: one pass finds the best logit, one adds up counts and
// weights by distance from it; then one block a row looks only at the few tokens that decide.
//
// Each condition of Sample() is about a place in the order of tokens, best first: where top_k ends, where the
// weights so far reach top_p, where they pass the draw. The bins say which tokens lie around it. If all from
// the best one to there are few, they are sorted and Sample()'s own steps follow. Otherwise each place is
// looked for by itself, in ever smaller ranges of logits, with the counts and weights of all before known
// exactly.
#include <climits>

#include "services/attention_gpu/backend/cuda/sampling_rows.cuh"

namespace tandem::attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChooseThreads = 1024;
constexpr int kBins = kSamplingBins;
constexpr int kFew = 2048;  // tokens that are sorted together
constexpr double kUnit = 0x1p-44;
constexpr double kRounding = 1e-9;  // more than sums of weights may be off by, relative

static_assert(kBins == kChooseThreads, "a thread for each bin");
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

// One block's memory while it chooses.
struct ChooseShared {
  uint32_t count[kBins];  // tokens in a bin and all before it
  Key weight[kBins];      // theirs, in units
  Key keys[kFew];         // tokens looked at; weights of ranges within a bin
  uint32_t sub_count[kBins];
  int found;
  int token;
  double value;
  Key sum;
};

// The first thread for which it is true; kChooseThreads if there is none.
__device__ __forceinline__ int FirstThread(bool is) {
  return BlockReduce<kChooseThreads>(is ? static_cast<int>(threadIdx.x) : kChooseThreads, Smaller());
}

// A row of logits and what one block knows of it. All threads of the block call each function together.
struct RowSearch {
  ChooseShared& s;
  const float* logits;
  int vocab;
  Weights weights;

  // A place in the order of tokens: the first one where, with all before it, they are `rank` many, or weigh
  // at least (kReach) or more than (kPass) `weight` units.
  struct Goal {
    enum { kRank, kReach, kPass } kind;
    uint32_t rank;
    double weight;

    __device__ __forceinline__ bool Met(uint32_t count, Key sum) const {
      if (kind == kRank) return count >= rank;
      return kind == kReach ? static_cast<double>(sum) >= weight : static_cast<double>(sum) > weight;
    }
  };
  struct Place {
    int token;
    Key sum;  // of the weights of all tokens up to this one
  };

  // Brings the tokens for which inside(logit) into s.keys, sorted. Their number.
  template <typename F>
  __device__ __forceinline__ int Gather(const F& inside) {
    if (threadIdx.x == 0) s.found = 0;
    __syncthreads();
    ForEach<kChooseThreads>(logits, 0, vocab, [&](float l, int token) {
      if (!inside(l)) return;
      const int at = atomicAdd(&s.found, 1);
      if (at < kFew) s.keys[at] = KeyOf(l, token);
    });
    __syncthreads();
    const int n = min(s.found, kFew);
    SortKeys<kChooseThreads>(s.keys, n);
    return n;
  }

  // Sample()'s choice where all that can matter lies in the bins up to `bin`.
  __device__ __noinline__ int ChooseAmongFew(const SamplingRow& r, int bin, bool by_rank, Key all) {
    const int found = Gather([&](float l) { return weights.Bin(l) <= bin; });
    const int n = by_rank ? min(found, r.top_k) : found;
    const int first = 2 * threadIdx.x;  // this thread's two places
    const double a = first < n ? weights.Exact(LogitOf(s.keys[first])) : 0;
    const double b = first + 1 < n ? weights.Exact(LogitOf(s.keys[first + 1])) : 0;
    const Prefix<double> sums = BlockPrefix<kChooseThreads>(a + b);
    const double sum_a = sums.before + a, sum_b = sums.before + a + b;
    // The first place of which is(weight, sum), `limit` if there is none below.
    auto first_place = [&](int limit, auto is) {
      int mine = limit;
      if (first + 1 < limit && is(b, sum_b)) mine = first + 1;
      if (first < limit && is(a, sum_a)) mine = first;
      return BlockReduce<kChooseThreads>(mine, Smaller());
    };
    auto sum_at = [&](int place) {
      if (first == place || first + 1 == place) s.value = first == place ? sum_a : sum_b;
      __syncthreads();
      const double sum = s.value;
      __syncthreads();
      return sum;
    };
    const double whole = by_rank ? sum_at(n - 1) : static_cast<double>(all) * kUnit;
    int keep = n;
    if (r.min_p > 0) {
      keep = max(first_place(n, [&](double w, double) { return !(w >= r.min_p); }), 1);
    }
    double kept = whole;
    if (r.top_p < 1) {
      const int last = first_place(keep, [&](double, double sum) { return sum >= r.top_p * whole; });
      keep = min(last + 1, keep);
    }
    if (r.top_p < 1 || r.min_p > 0) kept = sum_at(keep - 1);
    const double target = r.uniform * kept;
    const int place = first_place(keep, [&](double, double sum) { return sum > target; });
    return TokenOf(s.keys[min(place, keep - 1)]);
  }

  // The j-th of the tokens whose logit has this order, j from 1 on.
  __device__ __noinline__ int TokenAmongEqual(uint32_t order, uint32_t j) {
    uint32_t seen = 0;
    for (int at = 0; at < vocab; at += kChooseThreads) {
      const int token = at + static_cast<int>(threadIdx.x);
      const bool is = token < vocab && OrderOf(Clean(__ldcg(logits + token))) == order;
      const Prefix<uint32_t> counts = BlockPrefix<kChooseThreads>(is ? 1u : 0u);
      if (is && seen + counts.inclusive == j) s.token = token;
      const uint32_t here = BlockReduce<kChooseThreads>(is ? 1u : 0u, Sum());
      seen += here;
      if (seen >= j) break;
    }
    __syncthreads();
    return s.token;
  }

  __device__ __noinline__ Place Find(const Goal& goal) {
    int bin = FirstThread(goal.Met(s.count[threadIdx.x], s.weight[threadIdx.x]));
    if (bin == kBins) bin = FirstThread(s.count[threadIdx.x] == s.count[kBins - 1]);
    uint32_t before = bin > 0 ? s.count[bin - 1] : 0;  // the first token of the range
    Key sum = bin > 0 ? s.weight[bin - 1] : 0;
    uint32_t n = s.count[bin] - before;
    uint32_t low = 0, high = UINT_MAX;  // the range, beside the bin
    auto inside = [&](float l) {
      const uint32_t order = OrderOf(l);
      return weights.Bin(l) == bin && order >= low && order <= high;
    };
    while (n > kFew) {
      uint32_t least = UINT_MAX, most = 0;
      ForEach<kChooseThreads>(logits, 0, vocab, [&](float l, int) {
        if (!inside(l)) return;
        least = min(least, OrderOf(l));
        most = max(most, OrderOf(l));
      });
      least = BlockReduce<kChooseThreads>(least, Smaller());
      most = BlockReduce<kChooseThreads>(most, Larger());
      if (least >= most) {  // all alike
        const Key each = weights.Fixed(LogitOfOrder(least));
        uint32_t no = 0, yes = n;
        while (no + 1 < yes) {
          const uint32_t middle = no + (yes - no) / 2;
          (goal.Met(before + middle, sum + middle * each) ? yes : no) = middle;
        }
        return {TokenAmongEqual(least, yes), sum + yes * each};
      }
      const int shift = max(0, 32 - __clz(most - least) - 10);
      Key* sub_weight = s.keys;
      s.sub_count[threadIdx.x] = 0;
      sub_weight[threadIdx.x] = 0;
      __syncthreads();
      ForEach<kChooseThreads>(logits, 0, vocab, [&](float l, int) {
        if (!inside(l)) return;
        const uint32_t sub = (OrderOf(l) - least) >> shift;
        atomicAdd(s.sub_count + sub, 1u);
        const Key w = weights.Fixed(l);
        if (w != 0) atomicAdd(sub_weight + sub, w);
      });
      __syncthreads();
      const uint32_t count = BlockPrefix<kChooseThreads>(s.sub_count[threadIdx.x]).inclusive;
      const Key weight = BlockPrefix<kChooseThreads>(sub_weight[threadIdx.x]).inclusive;
      s.sub_count[threadIdx.x] = count;
      sub_weight[threadIdx.x] = weight;
      int sub = FirstThread(goal.Met(before + count, sum + weight));
      if (sub == kBins) sub = FirstThread(count == n);
      const uint32_t skipped = sub > 0 ? s.sub_count[sub - 1] : 0;
      n = s.sub_count[sub] - skipped;
      before += skipped;
      sum += sub > 0 ? sub_weight[sub - 1] : 0;
      low = least + (static_cast<uint32_t>(sub) << shift);
      high = min(most, low + ((1u << shift) - 1));
      __syncthreads();
    }
    const int found = Gather(inside);
    const int first = 2 * threadIdx.x;
    const Key a = first < found ? weights.Fixed(LogitOf(s.keys[first])) : 0;
    const Key b = first + 1 < found ? weights.Fixed(LogitOf(s.keys[first + 1])) : 0;
    const Key sum_a = sum + BlockPrefix<kChooseThreads>(a + b).before + a, sum_b = sum_a + b;
    int mine = found - 1;
    if (first + 1 < found && goal.Met(before + first + 2, sum_b)) mine = first + 1;
    if (first < found && goal.Met(before + first + 1, sum_a)) mine = first;
    const int place = BlockReduce<kChooseThreads>(mine, Smaller());
    if (first == place || first + 1 == place) s.sum = first == place ? sum_a : sum_b;
    __syncthreads();
    const Place out{TokenOf(s.keys[place]), s.sum};
    __syncthreads();
    return out;
  }

  // The distance from the best logit at which a token weighs `share` of it.
  __device__ __forceinline__ double DistanceOf(double share) const {
    return -log(share) / weights.inverse_temperature;
  }

  // The weight of all tokens that weigh at least `share` of the best one.
  __device__ __noinline__ Key SumAbove(double share) {
    const double distance = DistanceOf(share);
    const int low = Weights::BinAt(static_cast<float>(fmax(distance * (1 - 1e-5) - 1e-5, 0.0)));
    const int high = Weights::BinAt(static_cast<float>(distance * (1 + 1e-5) + 1e-5));
    Key sum = 0;  // of the bins where the border may lie
    ForEach<kChooseThreads>(logits, 0, vocab, [&](float l, int) {
      const int bin = weights.Bin(l);
      if (bin >= low && bin <= high && weights.Exact(l) >= share) sum += weights.Fixed(l);
    });
    sum = BlockReduce<kChooseThreads>(sum, Sum());
    return (low > 0 ? s.weight[low - 1] : 0) + sum;
  }

  __device__ __forceinline__ int Draw(const SamplingRow& r) {
    const Key all = s.weight[kBins - 1];
    const auto total = static_cast<double>(all);
    const bool by_rank = r.top_k > 0 && r.top_k < vocab;
    const bool cut = r.top_p < 1 || r.min_p > 0;
    // The bin that holds the last token which can matter.
    int bin = kBins - 1;
    if (by_rank) {
      bin = min(bin, FirstThread(s.count[threadIdx.x] >= static_cast<uint32_t>(r.top_k)));
    } else if (cut) {
      if (r.top_p < 1) {
        const double reach = r.top_p * total * (1 + kRounding);
        bin = min(bin, FirstThread(static_cast<double>(s.weight[threadIdx.x]) >= reach));
      }
      if (r.min_p > 0) {
        bin = min(bin, Weights::BinAt(static_cast<float>(DistanceOf(r.min_p) * (1 + 1e-5) + 1e-5)));
      }
    } else {
      const double pass = r.uniform * total * (1 + kRounding) + 1;
      bin = min(bin, FirstThread(static_cast<double>(s.weight[threadIdx.x]) > pass));
    }
    if (s.count[bin] <= kFew) return ChooseAmongFew(r, bin, by_rank, all);

    Key kept = all;
    if (by_rank) kept = Find({Goal::kRank, static_cast<uint32_t>(r.top_k), 0}).sum;
    const auto whole = static_cast<double>(kept);
    if (r.min_p > 0) kept = Smaller()(kept, SumAbove(r.min_p));
    if (r.top_p < 1) kept = Smaller()(kept, Find({Goal::kReach, 0, r.top_p * whole}).sum);
    return Find({Goal::kPass, 0, r.uniform * static_cast<double>(kept)}).token;
  }
};

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
