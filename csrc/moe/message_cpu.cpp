// Packs tokens into messages and unpacks them on a CPU; chunks.h says how the work is shared out.
#include "chunks.h"

namespace torchext {
namespace {

void write_header(const PackView& view, int64_t token, uint8_t* row) {
  const HeaderView& header = view.header;
  const MessageLayout& at = view.layout;
  std::memset(row + view.x.cols, 0, size_t(at.scales - view.x.cols));
  std::memset(row + at.end, 0, size_t(at.pitch - at.end));
  for (int64_t choice = 0; choice < header.choices; ++choice) {
    const int64_t i = token * header.token_stride + choice * header.choice_stride;
    const int64_t id = header.wide ? static_cast<const int64_t*>(header.ids)[i]
                                   : static_cast<const int32_t*>(header.ids)[i];
    const int32_t sent = id >= 0 && id <= INT32_MAX ? int32_t(id) : -1;
    const float weight = header.weights(token, choice);
    std::memcpy(row + at.ids + 4 * choice, &sent, sizeof sent);
    std::memcpy(row + at.weights + 4 * choice, &weight, sizeof weight);
  }
}

}  // namespace

void pack_cpu(const PackView& view) {
  const QuantizeTask task(view.x.dtype, view.options);
  const ChoicesView& rows = view.rows;
  const auto each_row = [&](int64_t token, auto&& write) {
    for (int64_t i = 0; i < rows.choices; ++i)
      if (rows.slots(token, i) >= 0) write(view.message + rows.slots(token, i) * view.layout.pitch);
  };
  for (int64_t token = 0; token < rows.tokens; ++token)
    each_row(token, [&](uint8_t* row) { write_header(view, token, row); });
  for_each_chunk(rows.tokens, view.x.cols, rows.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t* gathered) {
                   const uint8_t* from = contiguous(view.x, token, col, cols, gathered);
                   alignas(kLine) uint8_t codes[kChunk];
                   float scales[kChunk / kTile];
                   quantize_chunk(task, from, int(cols), codes, scales);
                   each_row(token, [&](uint8_t* row) {
                     std::memcpy(row + col, codes, size_t(cols));
                     std::memcpy(row + view.layout.scales + col / kTile * sizeof(float), scales,
                                 size_t(ceil_div(cols, kTile)) * sizeof(float));
                   });
                 });
}

void unpack_cpu(const UnpackView& view) {
  const ChoicesView& choices = view.choices;
  const QuantizedView& out = view.out;
  const bool stream = should_stream(out.data, out.data_stride, choices.rows);
  for (int64_t token = 0; token < choices.tokens; ++token)
    for (int64_t choice = 0; choice < choices.choices; ++choice) {
      const int64_t row = choices.slots(token, choice);
      if (row >= 0) view.weight[row] = choices.weights.data ? choices.weights(token, choice) : 1.0f;
    }
  const int64_t groups = ceil_div(view.cols, kTile);
  std::vector<float> scales(size_t(choices.tokens * groups));
  for (int64_t token = 0; token < choices.tokens; ++token)
    std::memcpy(scales.data() + token * groups,
                view.message + token * view.message_stride + view.scales,
                size_t(groups) * sizeof(float));
  for_each_chunk(choices.tokens, view.cols, choices.choices,
                 [&](int64_t token, int64_t col, int64_t cols, uint8_t*) {
                   const uint8_t* from = view.message + token * view.message_stride + col;
                   for (int64_t choice = 0; choice < choices.choices; ++choice) {
                     const int64_t row = choices.slots(token, choice);
                     if (row >= 0) write_row(from, cols, data_at(out, row, col), stream);
                   }
                 });
  write_scales(scales, groups, choices, out);
  for (int64_t row = *view.used; row < choices.rows; ++row) {
    if (view.cols > 0) std::memset(data_at(out, row, 0), 0, size_t(view.cols));
    for (int64_t group = 0; group < groups; ++group) scale_at(out, row, group) = 1;
    view.weight[row] = 0;
  }
}

}  // namespace torchext
