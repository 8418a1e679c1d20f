// The layout of an FFN's weights as experts, and back. Elements are moved as bits.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "core/layout.h"
#include "cuda/tensors.cuh"

namespace prunepath {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // rows of a tile that a block moves at once

// A matrix of any strides, counted in elements.
template <typename Data>
struct Matrix {
  Data* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Copies tiles through shared memory: reads run along the source's faster dimension and writes
// along the target's, so that both are coalesced when they differ (a transposition).
template <typename Element>
__global__ void __launch_bounds__(kTile* kTileRows)
    copy_matrix(Matrix<const Element> from, Matrix<Element> to, int64_t rows, int64_t columns) {
  __shared__ Element tile[kTile][kTile + 1];  // one more column: no bank conflicts
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  const int64_t tiles = column_tiles * ((rows + kTile - 1) / kTile);
  const bool reads_columns = from.column_stride <= from.row_stride;
  const bool writes_columns = to.column_stride <= to.row_stride;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t first_row = t / column_tiles * kTile;
    const int64_t first_column = t % column_tiles * kTile;
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int r = reads_columns ? i : threadIdx.x;
      const int c = reads_columns ? threadIdx.x : i;
      if (first_row + r < rows && first_column + c < columns) {
        tile[r][c] =
            from.data[(first_row + r) * from.row_stride + (first_column + c) * from.column_stride];
      }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int r = writes_columns ? i : threadIdx.x;
      const int c = writes_columns ? threadIdx.x : i;
      if (first_row + r < rows && first_column + c < columns) {
        to.data[(first_row + r) * to.row_stride + (first_column + c) * to.column_stride] =
            tile[r][c];
      }
    }
    __syncthreads();
  }
}

// A matrix inside a tensor: `offset` elements from its start, of the given strides.
struct View {
  const Tensor& tensor;
  int64_t offset;
  int64_t row_stride;
  int64_t column_stride;
};

View whole(const Tensor& matrix) { return {matrix, 0, matrix.stride(0), matrix.stride(1)}; }

template <typename Element>
void copy_as(const char* op, const View& from, const View& to, int64_t rows, int64_t columns) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t tiles = (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  const Matrix<const Element> source{
      static_cast<const Element*>(from.tensor.const_data_ptr()) + from.offset, from.row_stride,
      from.column_stride};
  const Matrix<Element> target{static_cast<Element*>(to.tensor.mutable_data_ptr()) + to.offset,
                               to.row_stride, to.column_stride};
  copy_matrix<Element><<<static_cast<unsigned>(std::min(tiles, kMaxBlocks)), dim3(kTile, kTileRows),
                         0, current_stream(to.tensor)>>>(source, target, rows, columns);
  check_launch(op);
}

void copy(const char* op, const View& from, const View& to, int64_t rows, int64_t columns) {
  if (rows == 0 || columns == 0) {
    return;
  }
  if (from.tensor.scalar_type() == ScalarType::Float) {
    copy_as<uint32_t>(op, from, to, rows, columns);
  } else {
    copy_as<uint16_t>(op, from, to, rows, columns);
  }
}

// The rows of w_in that hold gate (input 0 of 2) or up (the last input), as [D, H].
View input_of(const Tensor& w_in, const ExpertLayout& layout, int64_t input) {
  return {w_in, input * layout.hidden_size, in_offset(layout, 1), 1};
}

// w_out seen as down, [H, D].
View down_of(const Tensor& w_out, const ExpertLayout& layout) {
  return {w_out, 0, 1, out_offset(layout, 1)};
}

void pack_into(const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down,
               const ExpertLayout& layout, const Tensor& w_in, const Tensor& w_out) {
  const char* op = "pack_experts";
  const DeviceGuard guard(up.get_device_index());
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  if (gate.has_value()) {
    copy(op, whole(*gate), input_of(w_in, layout, 0), D, H);
  }
  copy(op, whole(up), input_of(w_in, layout, layout.per_neuron - 1), D, H);
  copy(op, whole(down), down_of(w_out, layout), H, D);
}

std::tuple<Tensor, Tensor> pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                                        const Tensor& down, int64_t num_experts) {
  const ExpertLayout layout = check_pack_experts(gate, up, down, num_experts);
  const auto [E, n, G, H] = layout;
  std::tuple<Tensor, Tensor> packed{torch::stable::new_empty(up, {E, n, G, H}),
                                    torch::stable::new_empty(up, {E, n, H})};
  pack_into(gate, up, down, layout, std::get<0>(packed), std::get<1>(packed));
  return packed;
}

void pack_experts_out(const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down,
                      int64_t num_experts, Tensor& w_in, Tensor& w_out) {
  const ExpertLayout layout = check_pack_experts(gate, up, down, num_experts);
  check_pack_experts_out(layout, up, w_in, w_out);
  pack_into(gate, up, down, layout, w_in, w_out);
}

void unpack_into(const Tensor& w_in, const Tensor& w_out, const ExpertLayout& layout,
                 const Tensor* gate, const Tensor& up, const Tensor& down) {
  const char* op = "unpack_experts";
  const DeviceGuard guard(w_in.get_device_index());
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  if (gate != nullptr) {
    copy(op, input_of(w_in, layout, 0), whole(*gate), D, H);
  }
  copy(op, input_of(w_in, layout, layout.per_neuron - 1), whole(up), D, H);
  copy(op, down_of(w_out, layout), whole(down), H, D);
}

std::vector<Tensor> unpack_experts(const Tensor& w_in, const Tensor& w_out) {
  const ExpertLayout layout = check_unpack_experts(w_in, w_out);
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  std::vector<Tensor> weights;
  for (int64_t input = 0; input < layout.per_neuron; ++input) {
    weights.push_back(torch::stable::new_empty(w_in, {D, H}));
  }
  weights.push_back(torch::stable::new_empty(w_in, {H, D}));
  const bool gated = layout.per_neuron == 2;
  unpack_into(w_in, w_out, layout, gated ? &weights[0] : nullptr, weights[gated ? 1 : 0],
              weights.back());
  return weights;
}

void unpack_experts_out(const Tensor& w_in, const Tensor& w_out, std::optional<Tensor> gate,
                        Tensor& up, Tensor& down) {
  const ExpertLayout layout = check_unpack_experts(w_in, w_out);
  check_unpack_experts_out(layout, w_in, gate, up, down);
  unpack_into(w_in, w_out, layout, gate.has_value() ? &*gate : nullptr, up, down);
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("pack_experts", TORCH_BOX(&prunepath::pack_experts));
  m.impl("pack_experts.out", TORCH_BOX(&prunepath::pack_experts_out));
  m.impl("unpack_experts", TORCH_BOX(&prunepath::unpack_experts));
  m.impl("unpack_experts.out", TORCH_BOX(&prunepath::unpack_experts_out));
}
