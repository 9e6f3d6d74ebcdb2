// Drives the reader with any bytes at all: shared by the mutation test and the fuzz target. For tests only.
#pragma once

#include <cstdint>
#include <span>

namespace tandem::gguf {

struct ExerciseResult {
  bool header_accepted = false;  // File::ParseHeader
  bool file_accepted = false;    // File::Open of a file with these bytes
};

// Parses `bytes` both ways and, where they are accepted, uses all of what the reader then offers: every typed
// read, every tensor's bytes, and writing the metadata again, which must read back the same. Aborts if the
// reader breaks a promise (a tensor outside its file, another fingerprint after the round trip).
ExerciseResult Exercise(std::span<const uint8_t> bytes);

}  // namespace tandem::gguf
