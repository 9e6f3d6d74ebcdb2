// Fuzz target of the GGUF reader, in the shape that libFuzzer and its relatives call:
//   clang++ -std=c++20 -I. -fsanitize=fuzzer,address,undefined tests/fuzz/gguf_fuzz.cc common/gguf/*.cc ... \
//     && ./a.out tests/fuzz/corpus/gguf
// (without the _test.cc files). The build replays the corpus through replay_main.cc, with any compiler.
#include <cstddef>
#include <cstdint>

#include "common/gguf/exercise_for_test.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tandem::gguf::Exercise({data, size});
  return 0;
}
