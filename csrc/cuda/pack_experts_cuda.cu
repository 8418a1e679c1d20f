#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/tensors.cuh"

namespace prunepath {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // rows of a tile that a block moves at once

// A matrix of any strides, counted in elements.
template <typename Element>
struct Source {
  const Element* data;
  int64_t row_stride;
  int64_t column_stride;
  const int64_t* order;  // row j of the copy is row order[j]; null: in order
};

// Copies tiles through shared memory, to contiguous rows: reads run along the source's faster
// dimension and writes along columns, so that both are coalesced in a transposition.
template <typename Element>
__global__ void __launch_bounds__(kTile* kTileRows)
    copy_rows(Source<Element> from, Element* to, int64_t rows, int64_t columns) {
  __shared__ Element tile[kTile][kTile + 1];  // one more column: no bank conflicts
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  const int64_t tiles = column_tiles * ((rows + kTile - 1) / kTile);
  const bool reads_columns = from.column_stride <= from.row_stride;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t first_row = t / column_tiles * kTile;
    const int64_t first_column = t % column_tiles * kTile;
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int r = reads_columns ? i : threadIdx.x;
      const int c = reads_columns ? threadIdx.x : i;
      if (first_row + r < rows && first_column + c < columns) {
        const int64_t row = from.order == nullptr ? first_row + r : from.order[first_row + r];
        tile[r][c] = from.data[row * from.row_stride + (first_column + c) * from.column_stride];
      }
    }
    __syncthreads();
    for (int r = threadIdx.y; r < kTile; r += kTileRows) {
      const int c = threadIdx.x;
      if (first_row + r < rows && first_column + c < columns) {
        to[(first_row + r) * columns + first_column + c] = tile[r][c];
      }
    }
    __syncthreads();
  }
}

template <typename Element>
void copy_as(const Tensor& from, bool transposed, const int64_t* order, const Tensor& to) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t rows = to.size(0);
  const int64_t columns = to.size(1);
  const int64_t tiles = (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  const Source<Element> source{static_cast<const Element*>(from.const_data_ptr()),
                               from.stride(transposed ? 1 : 0), from.stride(transposed ? 0 : 1),
                               order};
  if (tiles > 0) {
    copy_rows<Element><<<static_cast<unsigned>(std::min(tiles, kMaxBlocks)), dim3(kTile, kTileRows),
                         0, current_stream(to)>>>(
        source, static_cast<Element*>(to.mutable_data_ptr()), rows, columns);
    check_launch("pack_experts", cudaGetLastError());
  }
}

std::vector<Tensor> pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                                 const Tensor& down, const std::optional<Tensor>& order) {
  check_pack_experts(gate, up, down, order);
  const DeviceGuard guard(up.get_device_index());
  const auto* rows =
      order.has_value() ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
  std::vector<Tensor> tables;
  const auto add = [&](const Tensor& from, bool transposed) {
    tables.push_back(torch::stable::new_empty(up, {up.size(0), up.size(1)}));
    (up.scalar_type() == ScalarType::Float
         ? copy_as<uint32_t>
         : copy_as<uint16_t>)(from, transposed, rows, tables.back());
  };
  if (gate.has_value()) {
    add(*gate, false);
  }
  add(up, false);
  add(down, true);
  return tables;
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("pack_experts", TORCH_BOX(&prunepath::pack_experts));
}
