#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "core/layout.h"
#include "cpu/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace prunepath {
namespace {

// A matrix of 2- or 4-byte elements with any strides, which count bytes.
struct Matrix {
  char* data;
  int64_t row_stride;
  int64_t column_stride;
};

Matrix matrix(const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0) * size,
          tensor.stride(1) * size};
}

template <typename Word>
void copy_matrix_typed(const Matrix& from, const Matrix& to, int64_t rows, int64_t columns) {
  // Squares, so that both sides stay in cache where one of them is transposed.
  constexpr int64_t kSide = 64;
  const int64_t row_blocks = (rows + kSide - 1) / kSide;
  torch::stable::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r0 = begin * kSide; r0 < std::min(end * kSide, rows); r0 += kSide) {
      const int64_t r1 = std::min(r0 + kSide, rows);
      for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
        const int64_t c1 = std::min(c0 + kSide, columns);
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t c = c0; c < c1; ++c) {
            std::memcpy(to.data + r * to.row_stride + c * to.column_stride,
                        from.data + r * from.row_stride + c * from.column_stride, sizeof(Word));
          }
        }
      }
    }
  });
}

void copy_matrix(const Matrix& from, const Matrix& to, int64_t rows, int64_t columns,
                 int64_t element_size) {
  if (element_size == 2) {
    copy_matrix_typed<uint16_t>(from, to, rows, columns);
  } else {
    copy_matrix_typed<uint32_t>(from, to, rows, columns);
  }
}

// The rows of w_in that hold gate (which = 0) or up (which = G - 1), as [D, H].
Matrix in_rows(const Tensor& w_in, const ExpertLayout& layout, int64_t which) {
  const int64_t size = static_cast<int64_t>(w_in.element_size());
  return {static_cast<char*>(const_cast<void*>(w_in.const_data_ptr())) +
              which * layout.hidden_size * size,
          in_offset(layout, 1) * size, size};
}

// w_out seen as down, [H, D].
Matrix out_columns(const Tensor& w_out, const ExpertLayout& layout) {
  const int64_t size = static_cast<int64_t>(w_out.element_size());
  return {static_cast<char*>(const_cast<void*>(w_out.const_data_ptr())), size,
          out_offset(layout, 1) * size};
}

void pack(const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down,
          const ExpertLayout& layout, const Tensor& w_in, const Tensor& w_out) {
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  const int64_t size = static_cast<int64_t>(up.element_size());
  if (gate.has_value()) {
    copy_matrix(matrix(*gate), in_rows(w_in, layout, 0), D, H, size);
  }
  copy_matrix(matrix(up), in_rows(w_in, layout, layout.per_neuron - 1), D, H, size);
  copy_matrix(matrix(down), out_columns(w_out, layout), H, D, size);
}

// Asks for large pages where the system gives them on request: with small ones, streams of weights
// wait for address translation. It is no more than a hint, so that a refusal is no error.
void ask_for_large_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page;
  const uintptr_t end =
      (data + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size()) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

std::tuple<Tensor, Tensor> pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                                        const Tensor& down, int64_t num_experts) {
  const ExpertLayout layout = check_pack_experts(gate, up, down, num_experts);
  Tensor w_in = new_tensor(
      {num_experts, layout.expert_width, layout.per_neuron, layout.hidden_size}, up.scalar_type());
  Tensor w_out =
      new_tensor({num_experts, layout.expert_width, layout.hidden_size}, up.scalar_type());
  ask_for_large_pages(w_in);
  ask_for_large_pages(w_out);
  pack(gate, up, down, layout, w_in, w_out);
  return {w_in, w_out};
}

void pack_experts_out(const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down,
                      int64_t num_experts, const Tensor& w_in, const Tensor& w_out) {
  const ExpertLayout layout = check_pack_experts(gate, up, down, num_experts);
  check_pack_experts_out(layout, up, w_in, w_out);
  pack(gate, up, down, layout, w_in, w_out);
}

void unpack(const Tensor& w_in, const Tensor& w_out, const ExpertLayout& layout,
            const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down) {
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  const int64_t size = static_cast<int64_t>(w_in.element_size());
  if (gate.has_value()) {
    copy_matrix(in_rows(w_in, layout, 0), matrix(*gate), D, H, size);
  }
  copy_matrix(in_rows(w_in, layout, layout.per_neuron - 1), matrix(up), D, H, size);
  copy_matrix(out_columns(w_out, layout), matrix(down), H, D, size);
}

std::vector<Tensor> unpack_experts(const Tensor& w_in, const Tensor& w_out) {
  const ExpertLayout layout = check_unpack_experts(w_in, w_out);
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  const ScalarType dtype = w_in.scalar_type();
  std::optional<Tensor> gate;
  if (layout.per_neuron == 2) {
    gate = new_tensor({D, H}, dtype);
  }
  Tensor up = new_tensor({D, H}, dtype);
  Tensor down = new_tensor({H, D}, dtype);
  unpack(w_in, w_out, layout, gate, up, down);
  return gate.has_value() ? std::vector<Tensor>{*gate, up, down} : std::vector<Tensor>{up, down};
}

void unpack_experts_out(const Tensor& w_in, const Tensor& w_out, const std::optional<Tensor>& gate,
                        const Tensor& up, const Tensor& down) {
  const ExpertLayout layout = check_unpack_experts(w_in, w_out);
  check_unpack_experts_out(layout, w_in, gate, up, down);
  unpack(w_in, w_out, layout, gate, up, down);
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("pack_experts", TORCH_BOX(&prunepath::pack_experts));
  m.impl("pack_experts.out", TORCH_BOX(&prunepath::pack_experts_out));
  m.impl("unpack_experts", TORCH_BOX(&prunepath::unpack_experts));
  m.impl("unpack_experts.out", TORCH_BOX(&prunepath::unpack_experts_out));
}
