// Sparse attention on q, k and v from a file, with the CUDA driver alone.
//
//   salekit_example FOLDER INPUT.bin RESULT [options]      FOLDER: where salekit export wrote
//
// INPUT.bin: eight little-endian int32 (SALE_MAGIC, 1, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim),
// then q [batch, seqlen_q, num_heads, head_dim], k and v [batch, seqlen_k, num_kv_heads, head_dim], 16 bits an element.
// Writes RESULT.out.bin (like q), RESULT.lse.bin (float32 [batch, num_heads, seqlen_q]) and RESULT.mask.bin (uint32
// [batch, num_heads, query blocks, words]); prints the time of a call on the GPU and what launching it took the host.
#include "salekit_@TAG@.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const salekit_export& EXPORT = salekit_@TAG@;
constexpr int32_t SALE_MAGIC = 0x454c4153;  // "SALE"
constexpr const char* USAGE =
    "usage: salekit_example FOLDER INPUT.bin RESULT\n"
    "  [--tau X | --taus X,X,...] [--estimator auto|int4|int8|int8-sp24] [--attend exact|int8-fp8] [--block QxK]\n"
    "  [--query-stride N] [--full-rows N] [--sink N] [--local N] [--dense-below N] [--softmax-scale X]\n"
    "  [--non-causal] [--bhsd] [--repeat N] [--device N] [--graph] [--launches]\n";

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  fail(std::string(what) + " failed with " + (name ? name : "an unknown error"));
}

struct Options {
  std::string folder, input, result;
  salekit_problem problem;
  float tau = 0.008f;
  std::vector<float> taus;
  bool is_bhsd = false, prints_launches = false, uses_graph = false;
  int repeat = 1, device = 0;
};

std::vector<float> parse_list(const std::string& text) {
  std::vector<float> values;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    values.push_back(std::stof(text.substr(start, end - start)));
    start = end + 1;
  }
  return values;
}

int parse_estimator(const std::string& name) {
  const char* names[] = {"auto", "int4", "int8", "int8-sp24"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return i;  // the order of SALEKIT_AUTO, _INT4, _INT8, _INT8_SP24
  fail("--estimator: got " + name + "; wants auto, int4, int8 or int8-sp24");
}

Options parse(int count, char** words) {
  if (count < 4) fail(USAGE);
  Options o;
  salekit_defaults(&o.problem);
  o.folder = words[1], o.input = words[2], o.result = words[3];
  for (int i = 4; i < count; ++i) {
    const std::string name = words[i];
    if (name == "--non-causal") { o.problem.causal = 0; continue; }
    if (name == "--bhsd") { o.is_bhsd = true; continue; }
    if (name == "--graph") { o.uses_graph = true; continue; }
    if (name == "--launches") { o.prints_launches = true; continue; }
    if (++i == count) fail(USAGE);
    const std::string value = words[i];
    if (name == "--tau") o.tau = std::stof(value);
    else if (name == "--taus") o.taus = parse_list(value);
    else if (name == "--estimator") o.problem.estimator = parse_estimator(value);
    else if (name == "--attend") {
      if (value != "exact" && value != "int8-fp8") fail("--attend: got " + value + "; wants exact or int8-fp8");
      o.problem.attend = value == "exact" ? SALEKIT_EXACT : SALEKIT_INT8_FP8;
    }
    else if (name == "--block") {
      if (std::sscanf(value.c_str(), "%dx%d", &o.problem.block_q, &o.problem.block_k) != 2) fail(USAGE);
    }
    else if (name == "--query-stride") o.problem.query_stride = std::stoi(value);
    else if (name == "--full-rows") o.problem.full_rows = std::stoi(value);
    else if (name == "--sink") o.problem.sink = std::stoi(value);
    else if (name == "--local") o.problem.local = std::stoi(value);
    else if (name == "--dense-below") o.problem.dense_below = std::stoi(value);
    else if (name == "--softmax-scale") o.problem.softmax_scale = std::stod(value);
    else if (name == "--repeat") o.repeat = std::stoi(value);
    else if (name == "--device") o.device = std::stoi(value);
    else fail(USAGE);
  }
  return o;
}

// GPU memory. What is not filled holds a pattern: nothing may depend on it.
struct Memory {
  CUdeviceptr address = 0;
  size_t num_bytes;

  explicit Memory(size_t bytes) : num_bytes(bytes) {
    check(cuMemAlloc(&address, bytes ? bytes : 1), "cuMemAlloc");
    check(cuMemsetD8(address, 0x7f, bytes ? bytes : 1), "cuMemsetD8");
  }
  explicit Memory(const std::vector<char>& data) : Memory(data.size()) {
    if (num_bytes) check(cuMemcpyHtoD(address, data.data(), num_bytes), "cuMemcpyHtoD");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cuMemFree(address); }

  void save(const std::string& path) const {
    std::vector<char> data(num_bytes);
    if (num_bytes) check(cuMemcpyDtoH(data.data(), address, num_bytes), "cuMemcpyDtoH");
    std::FILE* file = std::fopen(path.c_str(), "wb");
    const bool is_written = file && std::fwrite(data.data(), 1, num_bytes, file) == num_bytes;
    if (!file || std::fclose(file) != 0 || !is_written) fail(path + ": cannot be written");
  }
};

struct Input {
  std::vector<char> q, k, v;

  Input(const std::string& path, salekit_problem& problem) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) fail(path + ": cannot be read");
    int32_t head[8];
    if (std::fread(head, 4, 8, file) != 8 || head[0] != SALE_MAGIC || head[1] != 1) fail(path + ": is no input file");
    if (head[7] != EXPORT.head_dim) fail(path + ": has another head_dim than these kernels");
    problem.batch = head[2], problem.seqlen_q = head[3], problem.seqlen_k = head[4];
    problem.num_heads = head[5], problem.num_kv_heads = head[6];
    for (int i = 2; i < 7; ++i)
      if (head[i] < 0) fail(path + ": has a negative size");
    const size_t row = size_t(head[2]) * head[7] * 2;
    q.resize(row * head[3] * head[5]);
    k.resize(row * head[4] * head[6]);
    v.resize(k.size());
    for (auto* part : {&q, &k, &v})
      if (std::fread(part->data(), 1, part->size(), file) != part->size()) fail(path + ": is cut short");
    std::fclose(file);
  }
};

salekit_tensor tensor(CUdeviceptr address, int64_t rows, int64_t heads, bool is_bhsd) {
  const int64_t head_dim = EXPORT.head_dim, batch = rows * heads * head_dim;
  if (is_bhsd) return {address, batch, head_dim, rows * head_dim};
  return {address, batch, heads * head_dim, head_dim};
}

CUresult print_launch(void*, const salekit_launch* launch) {
  if (!launch->kernel) {
    std::printf("zeros, %zu bytes\n", launch->fill_bytes);
  } else {
    std::printf("%s: grid %u x %u x %u, %u threads, %d bytes of shared memory, %d arguments\n", launch->kernel->name,
                launch->grid[0], launch->grid[1], launch->grid[2], launch->threads,
                launch->kernel->dynamic_shared_bytes + launch->kernel->static_shared_bytes, launch->num_arguments);
  }
  return CUDA_SUCCESS;
}

// A call as a CUDA graph that can be launched again and again.
struct Graph {
  CUgraph graph = nullptr;
  CUgraphExec executable = nullptr;

  template <typename Launch>
  Graph(CUstream stream, const Launch& launch) {
    check(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture");
    launch();
    check(cuStreamEndCapture(stream, &graph), "cuStreamEndCapture");
    check(cuGraphInstantiateWithFlags(&executable, graph, 0), "cuGraphInstantiateWithFlags");
  }
  Graph(const Graph&) = delete;
  ~Graph() {
    cuGraphExecDestroy(executable);
    cuGraphDestroy(graph);
  }
};

struct Times {
  double gpu_ms = 1e30, host_us = 1e30;
};

// The least of `repeat` calls.
template <typename Launch>
Times time_calls(int repeat, CUstream stream, const Launch& launch) {
  CUevent before, after;
  check(cuEventCreate(&before, CU_EVENT_DEFAULT), "cuEventCreate");
  check(cuEventCreate(&after, CU_EVENT_DEFAULT), "cuEventCreate");
  Times least;
  for (int i = 0; i < repeat; ++i) {
    check(cuEventRecord(before, stream), "cuEventRecord");
    const auto start = std::chrono::steady_clock::now();
    launch();
    const std::chrono::duration<double, std::micro> host = std::chrono::steady_clock::now() - start;
    check(cuEventRecord(after, stream), "cuEventRecord");
    check(cuStreamSynchronize(stream), "cuStreamSynchronize");
    float milliseconds = 0;
    check(cuEventElapsedTime(&milliseconds, before, after), "cuEventElapsedTime");
    least.gpu_ms = std::min(least.gpu_ms, double(milliseconds));
    least.host_us = std::min(least.host_us, host.count());
  }
  cuEventDestroy(before);
  cuEventDestroy(after);
  return least;
}

void run(const Options& o, salekit_problem problem) {
  const Input input(o.input, problem);
  if (!o.taus.empty() && o.taus.size() != size_t(problem.num_heads)) fail("--taus: wants a number for each head");
  char error[SALEKIT_ERROR_BYTES];
  salekit_context* context = nullptr;
  if (salekit_load(&context, &EXPORT, o.folder.c_str(), error) != SALEKIT_OK) fail(error);

  const Memory q(input.q), k(input.k), v(input.v), out(input.q.size());
  const Memory lse(size_t(problem.batch) * problem.num_heads * problem.seqlen_q * 4);
  const Memory mask(salekit_mask_words(&problem) * 4);
  const Memory workspace(salekit_workspace_bytes(&EXPORT, &problem));
  std::vector<char> taus(o.taus.size() * 4);
  if (!taus.empty()) std::memcpy(taus.data(), o.taus.data(), taus.size());
  const Memory thresholds(taus);

  salekit_call call = {};
  call.problem = problem;
  call.q = tensor(q.address, problem.seqlen_q, problem.num_heads, o.is_bhsd);
  call.k = tensor(k.address, problem.seqlen_k, problem.num_kv_heads, o.is_bhsd);
  call.v = tensor(v.address, problem.seqlen_k, problem.num_kv_heads, o.is_bhsd);
  call.out = tensor(out.address, problem.seqlen_q, problem.num_heads, o.is_bhsd);
  call.threshold = o.tau;
  call.thresholds = o.taus.empty() ? 0 : thresholds.address;
  call.lse = lse.address;
  call.mask = mask.address;
  call.workspace = workspace.address;
  call.workspace_bytes = workspace.num_bytes;
  if (o.prints_launches && salekit_visit_launches(context, &call, print_launch, nullptr, error) != SALEKIT_OK)
    fail(error);

  CUstream stream;
  check(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  check(cuCtxSynchronize(), "cuCtxSynchronize");  // the copies were not on this stream
  const auto launch = [&] {
    if (salekit_sparse_attention(context, &call, stream, error) != SALEKIT_OK) fail(error);
  };
  Times least;
  if (o.uses_graph) {
    const Graph graph(stream, launch);
    least = time_calls(o.repeat, stream, [&] { check(cuGraphLaunch(graph.executable, stream), "cuGraphLaunch"); });
  } else {
    least = time_calls(o.repeat, stream, launch);
  }
  out.save(o.result + ".out.bin");
  lse.save(o.result + ".lse.bin");
  mask.save(o.result + ".mask.bin");
  std::printf("batch %d, %d rows x %d keys, %d and %d heads: %.3f ms, host %.1f us, least of %d; workspace %zu\n",
              problem.batch, problem.seqlen_q, problem.seqlen_k, problem.num_heads, problem.num_kv_heads, least.gpu_ms,
              least.host_us, o.repeat, workspace.num_bytes);
  cuStreamDestroy(stream);
  salekit_free(context);
}

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = parse(count, words);
    CUdevice device;
    CUcontext cuda;
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, options.device), "cuDeviceGet");
    check(cuDevicePrimaryCtxRetain(&cuda, device), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(cuda), "cuCtxSetCurrent");
    run(options, options.problem);
    check(cuDevicePrimaryCtxRelease(device), "cuDevicePrimaryCtxRelease");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "salekit_example: %s\n", error.what());
    return 1;
  }
}
