// Fuzz target of the GGUF reader, in the shape that libFuzzer and its relatives call: build it with
// `clang++ -fsanitize=fuzzer,address,undefined` and the sources of tandem_gguf and tandem_gguf_exercise, and
// give it corpus/gguf. Ordinary builds replay that corpus through replay_main.cc.
#include <cstddef>
#include <cstdint>

#include "common/gguf/exercise_for_test.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tandem::gguf::Exercise({data, size});
  return 0;
}
