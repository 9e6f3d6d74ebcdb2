// The kernels on the shapes of DeepSeek-R1, each beside the ceiling measured in the same run; JSON lines.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>

#include "services/attention_gpu/backend/cuda/ceilings.h"
#include "services/attention_gpu/backend/cuda/expanded_heads.h"
#include "services/attention_gpu/backend/cuda/gpu_test_util.h"

namespace tandem::attention::cuda {
namespace {

using testing::DeviceArray;

constexpr int64_t kFar = int64_t{512} << 20;  // enough bytes that no cache holds them

// A stretch of work that is launched again and again, `rounds` of it as one graph. Seconds of one round, the
// median of several graphs.
double Time(int rounds, const std::function<cudaError_t(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  auto must = [](cudaError_t e) {
    if (e != cudaSuccess) {
      std::fprintf(stderr, "%s\n", cudaGetErrorString(e));
      std::exit(1);
    }
  };
  cudaGraph_t graph;
  cudaGraphExec_t run;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rounds; ++i) must(launch(i, stream));
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> seconds;
  for (int i = 0; i < 8; ++i) {
    cudaEventRecord(begin, stream);
    must(cudaGraphLaunch(run, stream));
    cudaEventRecord(end, stream);
    must(cudaStreamSynchronize(stream));
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 3) seconds.push_back(ms * 1e-3 / rounds);
  }
  std::sort(seconds.begin(), seconds.end());
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return seconds[seconds.size() / 2];
}

double read_ceiling = 0;    // bytes a second
double tensor_ceiling = 0;  // operations a second

void Report(const char* bench, const std::string& shape, int64_t tokens, double bytes, double flops,
            double seconds) {
  std::printf("{\"bench\": \"%s\", \"shape\": \"%s\", \"tokens\": %lld, \"microseconds\": %.2f, ", bench,
              shape.c_str(), static_cast<long long>(tokens), seconds * 1e6);
  std::printf("\"gbps\": %.1f, \"ceiling_gbps\": %.1f, \"ratio\": %.3f", bytes / seconds / 1e9,
              read_ceiling / 1e9, bytes / seconds / read_ceiling);
  if (flops > 0) {
    std::printf(", \"tflops\": %.1f, \"ceiling_tflops\": %.1f, \"tflops_ratio\": %.3f",
                flops / seconds / 1e12, tensor_ceiling / 1e12, flops / seconds / tensor_ceiling);
  }
  std::printf("}\n");
  std::fflush(stdout);
}

void Ceilings() {
  const DeviceArray<uint8_t> data(2 * kFar);
  const DeviceArray<uint32_t> sink(1);
  double seconds =
      Time(4, [&](int, cudaStream_t s) { return LaunchRead(data.get(), 2 * kFar, sink.get(), s); });
  read_ceiling = 2.0 * kFar / seconds;
  double flops = 0;
  const DeviceArray<float> result(1);
  seconds = Time(4, [&](int, cudaStream_t s) { return LaunchTensorWork(result.get(), &flops, s); });
  tensor_ceiling = flops / seconds;
  std::printf("{\"bench\": \"ceilings\", \"read_gbps\": %.1f, \"mma_f16_tflops\": %.1f}\n",
              read_ceiling / 1e9, tensor_ceiling / 1e12);
}

struct WeightShape {
  const char* name;
  gguf::TensorType type;
  int64_t rows, cols;
  int64_t batches = 1;
};

// Random bytes are valid blocks; scales that are not finite cost no more than others.
std::vector<uint8_t> RandomBytes(int64_t n) {
  std::mt19937_64 rng(1);
  std::vector<uint8_t> bytes(n);
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    const uint64_t v = rng();
    std::memcpy(bytes.data() + i, &v, 8);
  }
  return bytes;
}

// Matrices of the same activations, types and batches.
void Products(const std::vector<WeightShape>& shapes, const std::vector<int>& columns, int tile = 0) {
  const WeightShape& s = shapes[0];
  const auto type = static_cast<int32_t>(s.type);
  const int64_t row_bytes = DeviceRowBytes(type, s.cols), heads = s.batches;
  int64_t rows = 0;
  std::string name = gguf::TypeName(s.type).data();
  for (const WeightShape& one : shapes) {
    rows += one.rows;
    name += " " + (heads > 1 ? std::to_string(heads) + "x" : std::string()) + std::to_string(one.rows) + "x" +
            std::to_string(one.cols) + " " + one.name;
  }
  const int64_t bytes = row_bytes * rows * heads;
  const auto copies = static_cast<int>(std::clamp<int64_t>(kFar / bytes, 1, 64));
  const DeviceArray<uint8_t> weights(RandomBytes(bytes * copies));
  std::mt19937 rng(2);
  const int64_t most = *std::max_element(columns.begin(), columns.end());
  const auto x = kernels::testing::Gaussian(rng, most * heads * s.cols);
  const DeviceArray<float> y(most * rows * heads);
  for (int n : columns) {
    const testing::DeviceActivations a({x.begin(), x.begin() + n * heads * s.cols}, n * heads, s.cols, s.cols,
                                       heads);
    const double seconds = Time(copies, [&](int i, cudaStream_t stream) {
      std::vector<ProductParams> products;
      int64_t row = 0;
      for (const WeightShape& one : shapes) {
        ProductParams p;
        p.w = {type, weights.get() + i * bytes + row * row_bytes, one.rows, s.cols, row_bytes};
        p.x = a.get();
        p.x_batch = heads > 1;
        p.x_column = heads;
        p.y = y.get() + row * n;
        p.y_batch = one.rows;
        p.y_column = one.rows * heads;
        p.columns = n;
        p.batches = static_cast<int32_t>(heads);
        p.tile = tile;
        products.push_back(p);
        row += one.rows * heads;
      }
      return n > kMaxColumns ? LaunchMatMul(products[0], stream)
                             : LaunchMatVecs(products.data(), static_cast<int>(products.size()), stream);
    });
    Report(n > kMaxColumns ? "cuda_matmul" : "cuda_matvec",
           name + (tile > 0 ? ", tiles of " + std::to_string(tile) : std::string()), n,
           static_cast<double>(bytes), n > kMaxColumns ? 2.0 * n * s.rows * s.cols : 0, seconds);
  }
}

// The small kernels of a layer, one after the other in a graph: what a launch of each costs.
void SmallKernels(int64_t rows) {
  const int64_t hidden = 7168, experts = 256, heads = 128, inner = 2048;
  std::mt19937 rng(4);
  const DeviceArray<float> x(kernels::testing::Gaussian(rng, rows * hidden)), y(rows * hidden * 4),
      weight(kernels::testing::Gaussian(rng, hidden)), weights(rows * 8);
  const DeviceArray<int8_t> q(Int8FormRows(rows, 1) * heads * 512);
  const DeviceArray<float2> meta(Int8FormRows(rows, 1) * heads * 16);
  const DeviceArray<int32_t> ids(rows * 8);
  auto report = [&](const char* name, const std::function<cudaError_t(int, cudaStream_t)>& launch) {
    std::printf("{\"bench\": \"cuda_small\", \"kernel\": \"%s\", \"rows\": %lld, \"microseconds\": %.2f}\n",
                name, static_cast<long long>(rows), Time(64, launch) * 1e6);
  };
  const DeviceArray<float> squares(rows * hidden / 32);
  NormFormParams norm;
  norm.x = x.get();
  norm.x_stride = norm.cols = hidden;
  norm.weight = weight.get();
  norm.y = y.get();
  norm.q = q.get();
  norm.q_meta = meta.get();
  norm.squares = squares.get();
  norm.rows = rows;
  report("norm 7168 and int8 form", [&](int, cudaStream_t s) { return LaunchNormForm(norm, s); });
  RmsNormParams whole;
  whole.x = x.get();
  whole.x_stride = whole.cols = hidden;
  whole.weight = weight.get();
  whole.y = y.get();
  whole.rows = rows;
  report("whole norm 7168", [&](int, cudaStream_t s) { return LaunchRmsNorm(whole, s); });
  report("add 7168", [&](int, cudaStream_t s) { return LaunchAdd(y.get(), x.get(), rows * hidden, s); });
  report("silu 2048", [&](int, cudaStream_t s) {
    return LaunchSiluMul({x.get(), x.get(), y.get(), q.get(), meta.get(), rows, inner}, s);
  });
  report("quantize 7168", [&](int, cudaStream_t s) {
    return LaunchQuantize({x.get(), hidden, rows, hidden, 1, q.get(), meta.get()}, s);
  });
  RouteParams route;
  route.logits = x.get();
  route.ids = ids.get();
  route.weights = weights.get();
  route.n = rows;
  route.experts = static_cast<int32_t>(experts);
  route.top_k = 8;
  route.groups = 8;
  route.top_groups = 4;
  route.sigmoid = route.normalize = true;
  report("route", [&](int, cudaStream_t s) { return LaunchRoute(route, s); });
}

// `split`: 0 for what SplitsOf says. `padding`: that many rows more in the launch, for up to kMaxSplits
// splits.
void Attention(int64_t tokens, int rows, bool decode, CacheType type = kCacheBf16, int split = 0,
               int padding = 0, int32_t shared_bytes = 0) {
  const int32_t heads = 128, lora = 512, rope = 64, width = lora + rope, page_tokens = 32;
  const int64_t row_bytes = CacheRowBytes(type, lora, rope), a_row = tokens * row_bytes;
  // One sequence a row in decode, all rows of one sequence in prefill.
  const int64_t sequences = decode ? rows : 1;
  const int64_t pages = (tokens + page_tokens - 1) / page_tokens * sequences;
  const int copies = static_cast<int>(std::clamp<int64_t>(kFar / (pages * page_tokens * row_bytes), 1, 16));
  // As 16-bit numbers of both types: small ones.
  std::vector<uint16_t> cache(pages * page_tokens * row_bytes / 2);
  std::mt19937 rng(3);
  for (uint16_t& v : cache) v = static_cast<uint16_t>(0x3c00 + (rng() & 0x83ff));
  std::vector<uint16_t> queries(static_cast<size_t>(rows) * heads * width);
  for (uint16_t& v : queries) v = static_cast<uint16_t>(0x2c00 + (rng() & 0x83ff));
  const DeviceArray<uint16_t> d_cache(cache.size() * copies), query(queries);
  for (int i = 0; i < copies; ++i) {
    cudaMemcpy(d_cache.get() + i * cache.size(), cache.data(), cache.size() * 2, cudaMemcpyHostToDevice);
  }
  std::vector<int32_t> table(pages), position(rows), first(rows), splits(rows), part(rows);
  std::iota(table.begin(), table.end(), 0);
  if (split == 0) split = decode ? SplitsOf(tokens) : 1;
  double seen = 0;
  for (int i = 0; i < rows; ++i) {
    position[i] = static_cast<int32_t>(decode ? tokens - 1 : tokens - rows + i);
    first[i] = decode ? static_cast<int32_t>(i * (pages / rows)) : 0;
    splits[i] = split;
    part[i] = i * split;
    seen += position[i] + 1;
  }
  for (int i = 0; i < padding; ++i) {
    position.push_back(-1);
    for (std::vector<int32_t>* v : {&first, &splits, &part}) v->push_back(0);
  }
  const DeviceArray<int32_t> d_table(table), d_position(position), d_first(first), d_splits(splits),
      d_part(part);
  const DeviceArray<float> out(static_cast<size_t>(rows) * heads * lora),
      partial(decode ? static_cast<size_t>(rows) * split * heads * lora : 1);
  const DeviceArray<float2> state(static_cast<size_t>(rows) * split * heads);
  AttentionParams p;
  p.rows = {d_position.get(), d_first.get(), d_table.get(), page_tokens, nullptr};
  p.splits = d_splits.get();
  p.first_partial = d_part.get();
  p.query = query.get();
  p.out = out.get();
  p.partial = partial.get();
  p.partial_state = state.get();
  p.n = rows + padding;
  p.heads = heads;
  p.lora = lora;
  p.rope = rope;
  p.most_splits = padding > 0 ? kMaxSplits : split;
  p.type = type;
  p.shared_bytes = shared_bytes;
  const double seconds = Time(copies, [&](int i, cudaStream_t stream) {
    p.cache = d_cache.get() + i * cache.size();
    return LaunchAttention(p, stream);
  });
  Report(decode ? "cuda_attention_decode" : "cuda_attention_prefill",
         "R1, context " + std::to_string(tokens) + (type == kCacheInt8 ? ", int8, " : ", bf16, ") +
             std::to_string(split) + " splits" + (padding > 0 ? ", padded" : "") +
             (shared_bytes > 0 ? ", less shared memory" : ""),
         rows, static_cast<double>(a_row * sequences), 2.0 * seen * heads * (width + lora), seconds);
}

// The last `rows` of `tokens` positions, all heads of a layer, but for the queries' product: whole, and its
// two largest parts alone for one group of heads. Operations are those of the expanded form.
void ExpandedAttention(int64_t tokens, int64_t rows, CacheType type) {
  model::ModelConfig c;
  c.num_attention_heads = 128;
  c.hidden_size = 7168;
  c.q_lora_rank = 1536;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = c.v_head_dim = 128;
  c.qk_rope_head_dim = 64;
  const int32_t page_tokens = 32;
  const uint64_t bytes = uint64_t{369} << 20;  // of R1's workspace
  const PrefillLayout at = LayOutPrefill(c, rows, tokens, bytes);
  const int64_t heads = c.num_attention_heads, pages = (tokens + page_tokens - 1) / page_tokens;
  std::mt19937 rng(5);
  std::vector<uint16_t> cache(pages * page_tokens * CacheRowBytes(type, 512, 64) / 2), k(heads * 512 * 128);
  for (uint16_t& v : cache) v = static_cast<uint16_t>(0x3c00 + (rng() & 0x83ff));
  for (uint16_t& v : k) v = static_cast<uint16_t>(0x2800 + (rng() & 0x83ff));
  const int64_t v_row = DeviceRowBytes(kQ4_K, 512);
  const DeviceArray<uint16_t> d_cache(cache), d_k(k);
  const DeviceArray<uint8_t> d_v(RandomBytes(heads * 128 * v_row)), scratch(bytes);
  std::vector<int32_t> table(pages);
  std::iota(table.begin(), table.end(), 0);
  const DeviceArray<int32_t> d_table(table), first_page(std::vector<int32_t>{0});
  const DeviceArray<float> angles(kernels::testing::Gaussian(rng, at.rows * 64));
  ExpandedRows r;
  r.cache = {d_cache.get(), d_table.get(), first_page.get(), page_tokens, 512, 64, type};
  r.k_b = {kF16, reinterpret_cast<const uint8_t*>(d_k.get()), 512, 128, 256};
  r.v_b = {kQ4_K, d_v.get(), 128, 512, v_row};
  r.rope = angles.get();
  r.scale = 0.1f;
  r.heads = static_cast<int32_t>(heads);
  r.scratch = scratch.get();
  auto whole = [&](int, cudaStream_t stream) {
    cudaError_t e = cudaSuccess;
    for (int64_t done = 0; done < rows; done += at.rows) {
      r.position = tokens - rows + done;
      r.n = std::min(at.rows, rows - done);
      if (e == cudaSuccess) e = LaunchExpandedBegin(r, at, stream);
      for (int64_t head = 0; head < heads; head += at.heads) {
        if (e == cudaSuccess) {  // keys and values lie where queries did
          e = cudaMemsetAsync(scratch.get() + at.q, 0x3c, at.rows * at.heads * 192 * 4, stream);
        }
        if (e == cudaSuccess) e = LaunchExpandedHeads(r, at, head, stream);
      }
    }
    return e;
  };
  const double mean = static_cast<double>(tokens) - static_cast<double>(rows - 1) / 2;
  const double pairs = static_cast<double>(rows * heads) * mean, all = static_cast<double>(tokens);
  const std::string shape = "R1, context " + std::to_string(tokens) +
                            (type == kCacheInt8 ? ", int8, " : ", bf16, ") + std::to_string(at.heads) +
                            " heads, " + std::to_string(at.positions) + " positions";
  const double read = all * static_cast<double>(CacheRowBytes(type, 512, 64));
  double made = 0;
  for (int64_t done = 0; done < rows; done += at.rows) {
    const int64_t seen = tokens - rows + std::min(done + at.rows, rows);
    made += 2.0 * 512 * 256 * static_cast<double>(heads * seen);
  }
  Report("cuda_prefill_expanded", shape, rows, read, 640 * pairs + made, Time(1, whole));

  // Its parts, on what is there now: one group's heads, the positions that fit, the last chunk's rows.
  PrefillAttentionParams p;
  auto place = [&](auto* pointer, uint64_t offset) {
    return reinterpret_cast<decltype(pointer)>(scratch.get() + offset);
  };
  uint16_t* halves = nullptr;
  float* floats = nullptr;
  p.query = place(halves, at.query);
  p.query_scale = place(floats, at.query_scale);
  p.expanded = place(halves, at.expanded);
  p.rotated = place(halves, at.rotated);
  p.unit = place(floats, at.unit);
  p.count = std::min(at.positions, tokens);
  p.n = std::min(at.rows, p.count);
  p.first_position = p.count - p.n;
  p.heads = static_cast<int32_t>(at.heads);
  p.nope = p.v = 128;
  p.rope = 64;
  p.out = place(halves, at.attended);
  p.out_row = heads * 128;
  const double part =
      static_cast<double>(p.n * at.heads) * (static_cast<double>(p.count) - static_cast<double>(p.n - 1) / 2);
  Report("cuda_prefill_attend_alone", shape, p.n, 0, 640 * part,
         Time(4, [&](int, cudaStream_t s) { return LaunchPrefillAttention(p, s); }));
  ProductParams v;
  v.w = r.v_b;
  v.x.h = place(halves, at.latents);
  v.x.cols = 512;
  v.x_batch = 0;
  v.y_half = place(halves, at.expanded) + 128;
  v.y_batch = 256;
  v.y_column = at.heads * 256;
  v.columns = static_cast<int32_t>(p.count);
  v.batches = p.heads;
  for (int tile : {64, 128, 256}) {
    v.tile = tile;
    Report("cuda_prefill_values_alone", shape + ", tiles of " + std::to_string(tile), p.count, 0,
           2.0 * 512 * 128 * static_cast<double>(at.heads * p.count),
           Time(4, [&](int, cudaStream_t s) { return LaunchMatMul(v, s); }));
  }
}

// `what`: only the benchmarks whose name has this in it.
int Main(const std::string& what) {
  if (!testing::NoGpu().empty()) {
    std::printf("skipped, no GPU: %s\n", testing::NoGpu().c_str());
    return 0;
  }
  const Device device = *OpenDevice(0);
  std::printf("{\"machine\": \"%s\"}\n", device.name.c_str());
  Ceilings();
  auto wanted = [&](const char* name) { return std::string(name).find(what) != std::string::npos; };
  using T = gguf::TensorType;
  if (wanted("matvec")) {
    for (T type : {T::kQ4_K, T::kQ5_K, T::kQ6_K, T::kQ8_0, T::kQ5_0, T::kQ4_0, T::kF16, T::kBF16, T::kF32}) {
      Products({{"attn_output", type, 7168, 16384}}, {1, 2, 4, 8, 16});
    }
  }
  if (wanted("layer")) {
    const WeightShape q_a{"q_a", T::kQ4_K, 1536, 7168}, kv_a{"kv_a", T::kQ4_K, 576, 7168},
        gate{"gate", T::kQ4_K, 2048, 7168}, up{"up", T::kQ4_K, 2048, 7168};
    for (const std::vector<WeightShape>& s :
         std::vector<std::vector<WeightShape>>{{q_a},
                                               {kv_a},
                                               {q_a, kv_a},
                                               {{"q_b", T::kQ4_K, 24576, 1536}},
                                               {{"attn_output", T::kQ4_K, 7168, 16384}},
                                               {{"k_b", T::kF16, 512, 128, 128}},
                                               {{"k_b", T::kQ8_0, 512, 128, 128}},
                                               {{"v_b", T::kQ4_K, 128, 512, 128}},
                                               {{"v_b", T::kF16, 128, 512, 128}},
                                               {gate},
                                               {gate, up},
                                               {{"shared down", T::kQ6_K, 7168, 2048}},
                                               {{"head", T::kQ6_K, 129280, 7168}},
                                               {{"router", T::kF32, 256, 7168}}}) {
      Products(s, {1, 4, 8, 16});
    }
  }
  if (wanted("small")) {
    for (int64_t rows : {1, 8}) SmallKernels(rows);
  }
  if (wanted("matmul")) {
    for (T type : {T::kQ4_K, T::kQ6_K, T::kQ8_0, T::kF16}) {
      Products({{"attn_output", type, 7168, 16384}}, {32, 64, 128, 256, 384, 640, 1024, 4096});
    }
    for (int tile : {64, 128, 256}) {
      Products({{"attn_output", T::kQ4_K, 7168, 16384}}, {512, 4096}, tile);
      Products({{"q_b", T::kQ4_K, 3072, 1536}}, {512, 4096}, tile);
      Products({{"kv_a", T::kQ4_K, 576, 7168}}, {512, 4096}, tile);
    }
  }
  if (wanted("attention")) {
    for (CacheType type : {kCacheBf16, kCacheInt8}) {
      for (int64_t tokens : {1024, 8192, 32768, 131072}) Attention(tokens, 1, true, type);
      for (int split : {16, 32}) Attention(8192, 1, true, type, split);
      Attention(131072, 1, true, type, 0, 0, 99 << 10);
      Attention(1024, 1, true, type, 0, 15);
      Attention(8192, 4, true, type);
      Attention(8192, 16, true, type);
      Attention(4096, 256, false, type);
      Attention(16384, 256, false, type);
    }
  }
  if (wanted("splits")) {
    for (int split : {4, 8, 16, 32}) Attention(1024, 1, true, kCacheBf16, split);
    for (int split : {16, 32, 64}) Attention(2048, 1, true, kCacheBf16, split);
    for (int rows : {1, 4, 16}) {
      for (int split : {8, 16, 32, 64}) Attention(8192, rows, true, kCacheBf16, split);
    }
    for (int split : {8, 16, 32}) Attention(1024, 8, true, kCacheBf16, split);
  }
  if (wanted("prefill")) {
    for (int64_t tokens : {4096, 16384}) {
      for (int rows : {256, 512}) Attention(tokens, rows, false);
      for (int64_t rows : {128, 256, 512, 4096, 16384}) {
        if (rows <= tokens) ExpandedAttention(tokens, rows, kCacheBf16);
      }
    }
    ExpandedAttention(131072, 4096, kCacheBf16);
    ExpandedAttention(16384, 4096, kCacheInt8);
  }
  return 0;
}

}  // namespace
}  // namespace tandem::attention::cuda

int main(int argc, char** argv) { return tandem::attention::cuda::Main(argc > 1 ? argv[1] : ""); }
