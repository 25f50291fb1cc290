// Splits PTX into tokens.
#include "lexer.h"

#include <cctype>
#include <cstring>

#include "ir.h"

namespace torchext::sim {

namespace {

bool is_digit(char c) {
  return std::isdigit(static_cast<unsigned char>(c)) != 0;
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

// The end of the number that starts at `i`. Malformed numbers (0x, 1.2.3, 5abc) are taken whole, so
// that the error shows all of them. '%' ends a number, because it is then an operator.
std::size_t end_of_number(const std::string& text, std::size_t i) {
  const bool prefixed = text[i] == '0' && i + 1 < text.size() &&
                        std::isalpha(static_cast<unsigned char>(text[i + 1])) != 0 &&
                        text[i + 1] != 'e' && text[i + 1] != 'E';  // 0x, 0b, 0f, 0d
  const std::size_t start = i;
  while (i < text.size() && is_word(text[i]) && text[i] != '%') {
    const bool exponent = !prefixed && i > start && (text[i] == 'e' || text[i] == 'E');
    ++i;
    if (exponent && i + 1 < text.size() && (text[i] == '+' || text[i] == '-') &&
        is_digit(text[i + 1])) {
      ++i;
    }
  }
  return i;
}

// The end of the word that starts at `i`. A type may follow .reg without a blank: CUDA's FP16
// header writes ".reg.b16 r;".
std::size_t end_of_word(const std::string& text, std::size_t i) {
  for (const char* storage : {".reg.", ".param.", ".local.", ".shared.", ".global.", ".const."}) {
    const std::size_t length = std::strlen(storage);
    if (text.compare(i, length, storage) == 0) return i + length - 1;
  }
  while (i < text.size()) {
    if (is_word(text[i])) {
      ++i;
    } else if (text.compare(i, 2, "::") == 0 && i + 2 < text.size() && is_word(text[i + 2])) {
      i += 2;
    } else {
      break;
    }
  }
  return i;
}

bool is_operator_of_two(char a, char b) {
  switch (a) {
    case '<':
    case '>':
      return b == a || b == '=';
    case '=':
    case '!':
      return b == '=';
    case '&':
    case '|':
      return b == a;
    default:
      return false;
  }
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
    } else if (c == '#' && (tokens.empty() || tokens.back().line != line)) {
      // ptxas takes "#line 5 "x.cu"" and "# 5 "x.cu"", and nothing else of a preprocessor's.
      std::size_t word = i + 1;
      while (word < size && (text[word] == ' ' || text[word] == '\t')) ++word;
      if (word < size && !is_digit(text[word]) && text.compare(word, 5, "line ") != 0)
        throw PtxError(module, line,
                       "preprocessor directives are not supported: preprocess the text first");
      while (i < size && text[i] != '\n') ++i;
    } else if (is_digit(c) || (c == '.' && is_digit(following))) {
      const std::size_t end = end_of_number(text, i);
      tokens.push_back({Token::number, text.substr(i, end - i), line});
      i = end;
    } else if (c == '%' && !tokens.empty() &&
               (tokens.back().kind == Token::number || tokens.back().is(')'))) {
      tokens.push_back({Token::punctuation, "%", line});
      ++i;
    } else if (is_word(c)) {
      const std::size_t end = end_of_word(text, i);
      tokens.push_back({Token::word, text.substr(i, end - i), line});
      i = end;
    } else if (is_operator_of_two(c, following)) {
      tokens.push_back({Token::punctuation, text.substr(i, 2), line});
      i += 2;
    } else {
      tokens.push_back({Token::punctuation, std::string(1, c), line});
      ++i;
    }
  }
  tokens.push_back({Token::end, "end of file", line});
  return tokens;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(separator, at), text.size());
    parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

}  // namespace torchext::sim
