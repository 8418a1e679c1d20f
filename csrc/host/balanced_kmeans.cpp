#include "host/balanced_kmeans.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

// The hot loops are compiled twice and chosen at load time, where the platform can do that. FMA and
// AVX-512 are left out on purpose: without fused operations both versions round alike, so that a
// seed gives the same clusters on either.
#if defined(__x86_64__) && defined(__gnu_linux__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && __GNUC__ >= 8))
#define PRUNEPATH_SIMD_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define PRUNEPATH_SIMD_CLONES
#endif

namespace py = pybind11;

namespace prunepath {
namespace {

constexpr int64_t kLanes = 16;     // columns of a tile
constexpr int64_t kRows = 4;       // rows of a tile: kRows * kLanes sums stay in registers
constexpr int64_t kRowBlock = 64;  // rows that stay in cache while all columns pass by
constexpr int64_t kSeedCandidates = kLanes;  // a tile's worth: fewer would cost the same
constexpr int kSwapTargets = 2;              // clusters tried for each point in a pass of swaps
constexpr int64_t kSeedSample = 16;          // points per cluster among which centres are sought
constexpr double kMinGain = 1e-4;            // relative improvement below which iterating ends
constexpr float kMaxNorm = 1e30f;            // keeps sums of products far from overflow

using Matrix = std::vector<float>;  // row-major

struct Rows {
  const float* data;
  int64_t count;
  int64_t width;
  const float* operator[](int64_t row) const { return data + row * width; }
};

// Calls work(begin, end) for consecutive pieces of 0..count, begin a multiple of `grain`. Pieces
// for which the system starts no thread are worked on here.
template <typename Work>
void parallel_for(int64_t count, int64_t grain, int num_threads, const Work& work) {
  const int64_t blocks = (count + grain - 1) / grain;
  const int64_t pieces = std::min<int64_t>(num_threads, blocks);
  std::vector<std::thread> threads;
  const auto bound = [&](int64_t piece) {
    return std::min(count, blocks * piece / pieces * grain);
  };
  threads.reserve(static_cast<size_t>(std::max<int64_t>(pieces, 0)));
  int64_t piece = 1;
  try {
    for (; piece < pieces; ++piece) {
      threads.emplace_back([&, piece] { work(bound(piece), bound(piece + 1)); });
    }
  } catch (const std::system_error&) {
    if (pieces > piece) work(bound(piece), count);
  }
  if (pieces > 0) work(0, bound(1));
  for (std::thread& thread : threads) thread.join();
}

PRUNEPATH_SIMD_CLONES
float dot(const float* a, const float* b, int64_t width) {
  float sums[kLanes] = {};
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[f + lane] * b[f + lane];
  }
  for (int64_t lane = 0; f < width; ++f, ++lane) sums[lane] += a[f] * b[f];
  return std::accumulate(sums, sums + kLanes, 0.0f);
}

// out[r, lane] = rows[r, :] . panel[:, lane] for kRows rows, panel being [width, kLanes].
PRUNEPATH_SIMD_CLONES
void multiply_tile(const float* const* rows, int64_t width, const float* panel, float* out) {
  float sums[kRows][kLanes] = {};
  for (int64_t f = 0; f < width; ++f) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[r][lane] += rows[r][f] * panel[f * kLanes + lane];
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) std::copy(sums[r], sums[r] + kLanes, out + r * kLanes);
}

// a . b^T as [a.count, b.count].
Matrix multiply(Rows a, Rows b, int num_threads) {
  const int64_t num_panels = (b.count + kLanes - 1) / kLanes;
  Matrix panels(num_panels * a.width * kLanes, 0.0f);
  for (int64_t j = 0; j < b.count; ++j) {
    float* lane = panels.data() + j / kLanes * a.width * kLanes + j % kLanes;
    for (int64_t f = 0; f < a.width; ++f) lane[f * kLanes] = b[j][f];
  }
  Matrix out(a.count * b.count);
  parallel_for(a.count, kRowBlock, num_threads, [&](int64_t begin, int64_t end) {
    float tile[kRows * kLanes];
    for (int64_t block = begin; block < end; block += kRowBlock) {
      const int64_t block_end = std::min(end, block + kRowBlock);
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t first = panel * kLanes;
        const int64_t lanes = std::min(kLanes, b.count - first);
        for (int64_t i = block; i < block_end; i += kRows) {
          const float* rows[kRows];
          for (int64_t r = 0; r < kRows; ++r) rows[r] = a[std::min(i + r, block_end - 1)];
          multiply_tile(rows, a.width, panels.data() + first * a.width, tile);
          for (int64_t r = 0; r < std::min(kRows, block_end - i); ++r) {
            std::copy_n(tile + r * kLanes, lanes, out.data() + (i + r) * b.count + first);
          }
        }
      }
    }
  });
  return out;
}

// Sums of each cluster's points, [num_clusters, width].
Matrix cluster_sums(Rows points, const std::vector<int32_t>& labels, int64_t num_clusters) {
  std::vector<double> sums(num_clusters * points.width, 0.0);
  for (int64_t i = 0; i < points.count; ++i) {
    double* sum = sums.data() + labels[i] * points.width;
    for (int64_t f = 0; f < points.width; ++f) sum[f] += points[i][f];
  }
  return Matrix(sums.begin(), sums.end());
}

// Sum of squared distances of the points to their clusters' centres.
double objective(Rows points, const Matrix& centres, const std::vector<int32_t>& labels) {
  double sum = 0;
  for (int64_t i = 0; i < points.count; ++i) {
    const float* centre = centres.data() + labels[i] * points.width;
    for (int64_t f = 0; f < points.width; ++f) {
      const double difference = double(points[i][f]) - centre[f];
      sum += difference * difference;
    }
  }
  return sum;
}

double sum_of_squares(const float* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(values[i]) * values[i];
  return sum;
}

// Greedy k-means++ (Arthur and Vassilvitskii 2007, section 4) on a sample: points are drawn with
// probability proportional to their squared distance to the centres so far; of several, the one
// that lowers the sum of these distances most becomes a centre. A sample of 16 points a cluster
// gave the clusters of all points to 0.2 % of the objective.
Matrix seed_centres(Rows all_points, int64_t num_clusters, uint64_t seed, int num_threads) {
  std::mt19937_64 random(seed);
  // The standard library's distributions differ between implementations.
  const auto uniform = [&] { return double(random() >> 11) * 0x1p-53; };

  std::vector<int64_t> order(all_points.count);
  std::iota(order.begin(), order.end(), 0);
  const int64_t sample_size = std::min(all_points.count, kSeedSample * num_clusters);
  Matrix sample(sample_size * all_points.width);
  std::vector<float> norms(sample_size);
  for (int64_t i = 0; i < sample_size; ++i) {
    std::swap(order[i], order[i + int64_t(uniform() * double(all_points.count - i))]);
    const float* point = all_points[order[i]];
    std::copy_n(point, all_points.width, sample.data() + i * all_points.width);
    norms[i] = float(sum_of_squares(point, all_points.width));
  }
  const Rows points{sample.data(), sample_size, all_points.width};

  std::vector<float> distances(points.count, 1.0f);
  std::vector<double> cumulative(points.count);
  Matrix centres, candidates(kSeedCandidates * points.width);
  int64_t chosen[kSeedCandidates];
  for (int64_t cluster = 0; cluster < num_clusters; ++cluster) {
    std::partial_sum(distances.begin(), distances.end(), cumulative.begin(), std::plus<double>());
    for (int64_t c = 0; c < kSeedCandidates; ++c) {
      const double target = uniform() * cumulative.back();
      const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), target);
      // All distances are 0 when distinct points are fewer than clusters: any point will do.
      chosen[c] = found != cumulative.end() ? found - cumulative.begin()
                                            : int64_t(uniform() * double(points.count));
      std::copy_n(points[chosen[c]], points.width, candidates.data() + c * points.width);
    }
    const Matrix products =
        multiply(points, {candidates.data(), kSeedCandidates, points.width}, num_threads);
    const auto distance = [&](int64_t i, int64_t c) {
      const float d = norms[i] + norms[chosen[c]] - 2 * products[i * kSeedCandidates + c];
      return i == chosen[c] ? 0.0f : std::max(d, 0.0f);
    };
    double totals[kSeedCandidates] = {};
    for (int64_t i = 0; i < points.count; ++i) {
      for (int64_t c = 0; c < kSeedCandidates; ++c) {
        const float d = distance(i, c);
        totals[c] += cluster == 0 ? d : std::min(distances[i], d);
      }
    }
    const int64_t best = std::min_element(totals, totals + kSeedCandidates) - totals;
    for (int64_t i = 0; i < points.count; ++i) {
      const float d = distance(i, best);
      distances[i] = cluster == 0 ? d : std::min(distances[i], d);
    }
    const float* centre = points[chosen[best]];
    centres.insert(centres.end(), centre, centre + points.width);
  }
  return centres;
}

// best[b] = the least costs[i, b] - costs[i, cluster] over the members i, who[b] = that member.
PRUNEPATH_SIMD_CLONES
void find_cheapest_moves(const float* costs, int64_t num_clusters, int64_t cluster,
                         const int32_t* members, int64_t num_members, float* best, int32_t* who) {
  for (int64_t b = 0; b < num_clusters; ++b) {
    best[b] = std::numeric_limits<float>::infinity();
    who[b] = -1;
  }
  for (int64_t m = 0; m < num_members; ++m) {
    const float* row = costs + members[m] * num_clusters;
    const float own = row[cluster];
    for (int64_t b = 0; b < num_clusters; ++b) {
      const float extra = row[b] - own;
      const bool less = extra < best[b];
      who[b] = less ? members[m] : who[b];
      best[b] = less ? extra : best[b];
    }
  }
}

// The balanced assignment of least total cost, for costs [num_points, num_clusters].
//
// It is a transport problem with few sinks, solved exactly by successive shortest paths in the
// graph of clusters: the edge a -> b is the cheapest move of a member of a into b. `prices` are the
// dual variables: every member of a cluster has its least costs[i, b] + prices[b] there, so that
// edges are non-negative once prices are counted in, and Dijkstra applies. Prices of an earlier,
// similar problem leave few points to place.
void assign(const Matrix& costs, int64_t num_clusters, std::vector<double>& prices,
            std::vector<int32_t>& labels) {
  const int64_t num_points = int64_t(labels.size());
  const size_t capacity = size_t(num_points / num_clusters);
  std::vector<std::vector<int32_t>> members(num_clusters);
  std::vector<int32_t> homeless;
  for (int64_t i = 0; i < num_points; ++i) {
    const float* row = costs.data() + i * num_clusters;
    int64_t nearest = 0;
    for (int64_t b = 1; b < num_clusters; ++b) {
      if (row[b] + prices[b] < row[nearest] + prices[nearest]) nearest = b;
    }
    const bool fits = members[nearest].size() < capacity;
    (fits ? members[nearest] : homeless).push_back(int32_t(i));
  }

  Matrix best(num_clusters * num_clusters);
  std::vector<int32_t> who(num_clusters * num_clusters);
  const auto refresh = [&](int64_t a) {
    find_cheapest_moves(costs.data(), num_clusters, a, members[a].data(),
                        int64_t(members[a].size()), best.data() + a * num_clusters,
                        who.data() + a * num_clusters);
  };
  for (int64_t a = 0; a < num_clusters; ++a) refresh(a);

  std::vector<double> distances(num_clusters);
  std::vector<int64_t> previous(num_clusters), open, settled;
  for (const int32_t point : homeless) {
    open.resize(num_clusters);
    std::iota(open.begin(), open.end(), 0);
    settled.clear();
    for (int64_t b = 0; b < num_clusters; ++b) {
      distances[b] = costs[point * num_clusters + b] + prices[b];
      previous[b] = -1;
    }
    int64_t target;
    while (true) {
      const auto nearest = std::min_element(open.begin(), open.end(), [&](int64_t a, int64_t b) {
        return distances[a] < distances[b];
      });
      target = *nearest;
      if (members[target].size() < capacity) break;
      *nearest = open.back();
      open.pop_back();
      settled.push_back(target);
      const float* edges = best.data() + target * num_clusters;
      const double base = distances[target] - prices[target];
      for (const int64_t b : open) {
        const double distance = base + edges[b] + prices[b];
        if (distance < distances[b]) {
          distances[b] = distance;
          previous[b] = target;
        }
      }
    }
    for (const int64_t a : settled) prices[a] += distances[target] - distances[a];

    int64_t gaining = target;
    for (int64_t a = previous[gaining]; a >= 0; a = previous[gaining]) {
      const int32_t moved = who[a * num_clusters + gaining];
      std::erase(members[a], moved);
      members[gaining].push_back(moved);
      refresh(gaining);
      gaining = a;
    }
    members[gaining].push_back(point);
    refresh(gaining);
  }
  for (int64_t a = 0; a < num_clusters; ++a) {
    for (const int32_t i : members[a]) labels[i] = int32_t(a);
  }
}

// One pass of swaps between clusters, each of which lowers the objective with the means moving
// along (Hartigan's criterion; with fixed means a point's own weight in its mean holds it back).
// Exchanging i of a with j of b lowers it by 2/n * (|x_i - x_j|^2 + (x_i - x_j).(sum_b - sum_a)).
// `products` are the points' products with the sums at the start of the pass: they only choose
// which clusters to try.
void swap_pass(Rows points, const std::vector<float>& norms, const Matrix& products,
               int64_t num_clusters, Matrix& sums, std::vector<int32_t>& labels) {
  std::vector<std::vector<int32_t>> members(num_clusters);
  for (int64_t i = 0; i < points.count; ++i) members[labels[i]].push_back(int32_t(i));
  const auto gain_of_moving = [&](int64_t i, int64_t b) {
    const float* row = products.data() + i * num_clusters;
    return row[b] - row[labels[i]] + norms[i];
  };
  // best_gain[a, b]: the most that a member of a gains by moving to b.
  Matrix best_gain(num_clusters * num_clusters, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < points.count; ++i) {
    float* row = best_gain.data() + labels[i] * num_clusters;
    for (int64_t b = 0; b < num_clusters; ++b) row[b] = std::max(row[b], gain_of_moving(i, b));
  }

  std::vector<float> direction(points.width);
  std::vector<std::pair<float, int64_t>> targets;
  for (int64_t i = 0; i < points.count; ++i) {
    const int64_t a = labels[i];
    targets.clear();
    for (int64_t b = 0; b < num_clusters; ++b) {
      const float hope = gain_of_moving(i, b) + best_gain[b * num_clusters + a];
      if (b != a && hope > 0) targets.emplace_back(-hope, b);
    }
    const size_t tried = std::min<size_t>(kSwapTargets, targets.size());
    std::partial_sort(targets.begin(), targets.begin() + tried, targets.end());
    targets.resize(tried);

    float most = 1e-5f * norms[i];  // above rounding
    int32_t* partner = nullptr;
    int64_t partner_cluster = -1;
    for (const auto& [hope, b] : targets) {
      const float* sum_a = sums.data() + a * points.width;
      const float* sum_b = sums.data() + b * points.width;
      for (int64_t f = 0; f < points.width; ++f) {
        direction[f] = sum_a[f] - sum_b[f] - 2 * points[i][f];
      }
      const float own =
          norms[i] + dot(points[i], sum_b, points.width) - dot(points[i], sum_a, points.width);
      for (int32_t& j : members[b]) {
        const float gain = own + norms[j] + dot(points[j], direction.data(), points.width);
        if (gain > most) {
          most = gain;
          partner = &j;
          partner_cluster = b;
        }
      }
    }
    if (partner == nullptr) continue;
    const int32_t j = *partner;
    *partner = int32_t(i);
    *std::find(members[a].begin(), members[a].end(), int32_t(i)) = j;
    labels[i] = int32_t(partner_cluster);
    labels[j] = int32_t(a);
    for (int64_t f = 0; f < points.width; ++f) {
      const float difference = points[j][f] - points[i][f];
      sums[a * points.width + f] += difference;
      sums[partner_cluster * points.width + f] -= difference;
    }
  }
}

// The points minus their mean: distances stay, and float32 products lose less to cancellation.
Matrix centred(Rows points) {
  std::vector<double> mean(points.width, 0.0);
  for (int64_t i = 0; i < points.count; ++i) {
    for (int64_t f = 0; f < points.width; ++f) mean[f] += points[i][f];
  }
  for (double& m : mean) m /= double(points.count);
  Matrix out(points.count * points.width);
  for (int64_t i = 0; i < points.count; ++i) {
    for (int64_t f = 0; f < points.width; ++f) {
      out[i * points.width + f] = float(points[i][f] - mean[f]);
    }
  }
  return out;
}

}  // namespace

std::vector<int32_t> balanced_kmeans(const float* data, int64_t num_points, int64_t num_features,
                                     int64_t num_clusters, const BalancedKMeansOptions& options) {
  const auto require = [](bool met, const std::string& message) {
    if (!met) throw std::invalid_argument("balanced_kmeans: " + message);
  };
  require(num_points > 0 && num_features > 0 && num_points <= std::numeric_limits<int32_t>::max(),
          "expected points of shape [N, F] with N and F at least 1, got [" +
              std::to_string(num_points) + ", " + std::to_string(num_features) + "].");
  require(num_clusters > 0 && num_points % num_clusters == 0,
          "expected num_clusters to divide the number of points " + std::to_string(num_points) +
              ", got " + std::to_string(num_clusters) + ".");
  require(options.max_iterations > 0, "expected max_iterations of at least 1, got " +
                                          std::to_string(options.max_iterations) + ".");
  require(options.num_threads >= 0,
          "expected num_threads of at least 0, got " + std::to_string(options.num_threads) + ".");
  const int num_threads = options.num_threads > 0
                              ? options.num_threads
                              : std::max(1, int(std::thread::hardware_concurrency()));

  const Matrix values = centred({data, num_points, num_features});
  const Rows points{values.data(), num_points, num_features};
  std::vector<float> norms(num_points);
  for (int64_t i = 0; i < num_points; ++i) {
    norms[i] = float(sum_of_squares(points[i], num_features));
    require(norms[i] <= kMaxNorm, "expected finite points with a squared norm of at most 1e30.");
  }

  std::vector<int32_t> labels(num_points);
  if (num_clusters == num_points) {
    std::iota(labels.begin(), labels.end(), 0);
    return labels;
  }
  Matrix centres = seed_centres(points, num_clusters, options.seed, num_threads);
  Matrix sums(centres.size());
  std::vector<double> prices(num_clusters, 0.0);
  bool swapping = false;
  double last = std::numeric_limits<double>::infinity();
  for (int done = 1; done <= options.max_iterations; ++done) {
    if (swapping) {
      const Rows targets{sums.data(), num_clusters, num_features};
      const Matrix products = multiply(points, targets, num_threads);
      swap_pass(points, norms, products, num_clusters, sums, labels);
    } else {
      const Rows targets{centres.data(), num_clusters, num_features};
      Matrix costs = multiply(points, targets, num_threads);
      for (int64_t b = 0; b < num_clusters; ++b) {
        // The squared distance less the point's own norm, which no assignment changes.
        const float norm = float(sum_of_squares(targets[b], num_features));
        for (int64_t k = b; k < num_points * num_clusters; k += num_clusters) {
          costs[k] = norm - 2 * costs[k];
        }
      }
      assign(costs, num_clusters, prices, labels);
    }
    sums = cluster_sums(points, labels, num_clusters);
    const float scale = float(num_clusters) / float(num_points);
    for (size_t k = 0; k < sums.size(); ++k) centres[k] = sums[k] * scale;
    const double current = objective(points, centres, labels);

    const bool settled = current >= (1 - kMinGain) * last;
    const bool finished = settled && swapping;
    if (options.progress) {
      options.progress(finished ? options.max_iterations : done, options.max_iterations);
    }
    if (finished) break;
    swapping = swapping || settled;
    last = current;
  }
  return labels;
}

double within_cluster_sum_of_squares(const float* data, int64_t num_points, int64_t num_features,
                                     const std::vector<int32_t>& labels, int64_t num_clusters) {
  const Rows points{data, num_points, num_features};
  std::vector<double> sizes(std::max<int64_t>(num_clusters, 0), 0.0);
  for (const int32_t label : labels) {
    if (label < 0 || label >= num_clusters) {
      throw std::invalid_argument("within_cluster_sum_of_squares: expected labels from 0 to " +
                                  std::to_string(num_clusters - 1) + ", got " +
                                  std::to_string(label) + ".");
    }
    sizes[label] += 1;
  }
  Matrix centres = cluster_sums(points, labels, num_clusters);
  for (size_t k = 0; k < centres.size(); ++k) {
    centres[k] = float(centres[k] / std::max(1.0, sizes[k / num_features]));
  }
  return objective(points, centres, labels);
}

}  // namespace prunepath

void bind_balanced_kmeans(py::module_& module) {
  using Points = py::array_t<float, py::array::c_style | py::array::forcecast>;
  using Labels = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
  module.def(
      "balanced_kmeans",
      [](const Points& points, int64_t num_clusters, int max_iterations, uint64_t seed,
         int num_threads, const py::object& progress) {
        if (points.ndim() != 2) {
          throw std::invalid_argument("balanced_kmeans: expected points of shape [N, F], got " +
                                      std::to_string(points.ndim()) + " dimensions.");
        }
        prunepath::BalancedKMeansOptions options{max_iterations, seed, num_threads, {}};
        options.progress = [&](int done, int total) {
          py::gil_scoped_acquire acquire;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          if (!progress.is_none()) progress(done, total);
        };
        std::vector<int32_t> labels;
        {
          py::gil_scoped_release release;
          labels = prunepath::balanced_kmeans(points.data(), points.shape(0), points.shape(1),
                                              num_clusters, options);
        }
        const auto count = static_cast<py::ssize_t>(labels.size());
        return py::array_t<int32_t>(count, labels.data());
      },
      py::arg("points"), py::arg("num_clusters"), py::kw_only(), py::arg("max_iterations") = 50,
      py::arg("seed") = 0, py::arg("num_threads") = 0, py::arg("progress") = py::none(),
      R"(Clusters points so that every cluster has exactly N / num_clusters of them.

Args:
    points: float32 [N, F], finite.
    num_clusters: must divide N.
    max_iterations: of Lloyd's algorithm and of swaps between clusters, together.
    seed: of the initial centres.
    num_threads: 0 for as many as the machine has. The result does not depend on it.
    progress: called as progress(done, total) after every iteration; what it raises ends the work.

Returns:
    labels int32 [N].)");
  module.def(
      "within_cluster_sum_of_squares",
      [](const Points& points, const Labels& labels, int64_t num_clusters) {
        if (points.ndim() != 2 || labels.ndim() != 1 || labels.shape(0) != points.shape(0)) {
          throw std::invalid_argument(
              "within_cluster_sum_of_squares: expected points of shape [N, F] and labels of shape "
              "[N].");
        }
        const std::vector<int32_t> of_points(labels.data(), labels.data() + labels.size());
        return prunepath::within_cluster_sum_of_squares(points.data(), points.shape(0),
                                                        points.shape(1), of_points, num_clusters);
      },
      py::arg("points"), py::arg("labels"), py::arg("num_clusters"),
      "What balanced_kmeans lowers: the sum of squared distances of points float32 [N, F] to the "
      "means of their clusters, for labels int32 [N].");
}
