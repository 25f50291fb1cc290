// Splits PTX into tokens.
#include "lexer.h"

#include <cctype>

#include "ir.h"

namespace torchext::sim {

namespace {
bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}
}  // namespace

std::vector<Token> tokenize(const std::string& text, const std::string& module) {
  std::vector<Token> tokens;
  std::uint32_t line = 1;
  const std::size_t size = text.size();
  for (std::size_t i = 0; i < size;) {
    const char c = text[i];
    const char following = i + 1 < size ? text[i + 1] : '\0';
    if (c == '\n') {
      ++line;
      ++i;
    } else if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
      ++i;
    } else if (c == '/' && following == '/') {
      while (i < size && text[i] != '\n') ++i;
    } else if (c == '/' && following == '*') {
      const std::size_t close = text.find("*/", i + 2);
      if (close == std::string::npos) throw PtxError(module, line, "comment without an end");
      for (; i < close + 2; ++i) line += text[i] == '\n';
    } else if (c == '"') {
      const std::uint32_t first = line;
      std::string value;
      for (++i; i < size && text[i] != '"'; ++i) {
        line += text[i] == '\n';
        value += text[i];
      }
      if (i == size) throw PtxError(module, first, "string without an end");
      ++i;
      tokens.push_back({Token::string, value, first});
    } else if (is_word(c)) {
      const std::size_t start = i;
      while (i < size && (is_word(text[i]) || (text[i] == ':' && i + 2 < size &&
                                               text[i + 1] == ':' && is_word(text[i + 2])))) {
        i += text[i] == ':' ? 2 : 1;
      }
      tokens.push_back({Token::word, text.substr(start, i - start), line});
    } else {
      tokens.push_back({Token::punctuation, std::string(1, c), line});
      ++i;
    }
  }
  tokens.push_back({Token::end, "end of file", line});
  return tokens;
}

}  // namespace torchext::sim
