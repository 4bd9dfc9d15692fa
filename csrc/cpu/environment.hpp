// Environment variables: set to nothing is as good as unset, and blanks around a value do not count.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>

namespace gradclip::cpu {

inline std::optional<std::string> from_environment(const char* name) {
  const char* const value = std::getenv(name);
  if (!value) return std::nullopt;
  const std::string text(value);
  const char* const blanks = " \t\r\n";
  const std::size_t first = text.find_first_not_of(blanks);
  if (first == std::string::npos) return std::nullopt;
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

}  // namespace gradclip::cpu
