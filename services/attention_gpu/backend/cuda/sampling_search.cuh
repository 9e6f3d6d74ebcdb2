// How one block chooses among a row's tokens.
//
// Each condition of Sample() is about a place in the order of tokens, best first: where top_k ends, where the
// weights so far reach top_p, where they pass the draw. The bins say which tokens lie around it. If all from
// the best one to there are few, they are sorted and Sample()'s own steps follow. Otherwise each place is
// looked for by itself, in ever smaller ranges of logits, with the counts and weights of all before known
// exactly.
#pragma once

#include <climits>

#include "services/attention_gpu/backend/cuda/sampling_rows.cuh"

namespace tandem::attention::cuda {

constexpr int kChooseThreads = 1024;
constexpr int kBins = kSamplingBins;
constexpr int kFew = 2048;  // tokens that are sorted together
constexpr double kUnit = 0x1p-44;
constexpr double kRounding = 1e-9;  // more than sums of weights may be off by, relative

static_assert(kBins == kChooseThreads, "a thread for each bin");

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
    ForEach<kChooseThreads, 4>(logits, 0, vocab, [&](float l, int token) {
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

}  // namespace tandem::attention::cuda
