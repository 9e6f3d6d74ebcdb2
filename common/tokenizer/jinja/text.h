// Python's string operations on UTF-8: positions and lengths are in code points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::jinja {

// The code point at `pos`; a byte that is not UTF-8 stands for itself.
uint32_t DecodeChar(std::string_view s, size_t pos, size_t* length);
size_t CharCount(std::string_view s);
// Each character as a string.
std::vector<std::string> Chars(std::string_view s);

bool IsSpaceChar(uint32_t c);  // str.isspace()

enum Side { kLeft = 1, kRight = 2, kBoth = 3 };
// strip, lstrip, rstrip: of white space, or of the characters in `chars` if not null.
std::string_view Strip(std::string_view s, int sides, const std::string_view* chars = nullptr);

std::string Upper(std::string_view s);
std::string Lower(std::string_view s);
std::string Capitalize(std::string_view s);  // str.capitalize()
std::string Title(std::string_view s);       // str.title()
std::string TitleFilter(
    std::string_view s);  // jinja2's filter, which cuts words at spaces, hyphens and brackets

// str.replace; count < 0 = all.
std::string Replace(std::string_view s, std::string_view from, std::string_view to, int64_t count);
// str.split and str.rsplit at `separator` (not empty), or at runs of white space if null; limit < 0 = all.
std::vector<std::string> SplitAt(std::string_view s, const std::string_view* separator, int64_t limit,
                                 bool from_right);
std::vector<std::string> SplitLines(std::string_view s, bool keep_ends);

void AppendStringRepr(std::string_view s, std::string* out);  // repr()
std::string EscapeHtml(std::string_view s);

}  // namespace tandem::jinja
