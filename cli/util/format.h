// Numbers for people. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>

namespace tandem::cli {

std::string FormatBytes(uint64_t bytes);  // "404.3 GB", "13.1 MB", "512 B": powers of 1000
std::string FormatCount(uint64_t count);  // "671.0 B", "21.6 M", "950"
std::string Grouped(uint64_t number);     // "163,840"
// `text` without control characters and broken UTF-8, so that a file's strings cannot drive the terminal.
std::string Printable(const std::string& text);

}  // namespace tandem::cli
