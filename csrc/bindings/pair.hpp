// Gradients and a second list of arrays, one for each: parameters, or what an update began from.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/gradients.hpp"
#include "core/pair.hpp"
#include "cpu/engine.hpp"

namespace gradclip::bindings {

class Pair {
 public:
  // Of regularisation: gradients + l2 * params + l1 * sign(params).
  static Pair with_params(std::shared_ptr<const Gradients> grads, const py::object& params,
                          const py::object& l2, const py::object& l1);
  // Of an update: the gradients are what base has become.
  static Pair with_base(std::shared_ptr<const Gradients> grads, const py::object& base);

  const std::shared_ptr<const Gradients>& gradients() const { return grads_; }
  bool is_difference() const { return is_difference_; }
  // l2 / 2 * the squares + l1 * the magnitudes.
  double penalty(const PairSums& sums) const;

  // What is made where gradients hold grad_scale times what they are; of `rows`, part by part.
  cpu::PairTable table(double grad_scale, bool of_rows) const;
  // As of Gradients: of both lists, and that no gradient lies where a second array does.
  void require_writable() const;
  void require_unchanged() const { second_->require_unchanged(reader()); }
  template <class... Arguments>
  void recheck(const Arguments&... arguments) const {
    second_->recheck(reader(), arguments...);
  }

 private:
  Pair(std::shared_ptr<const Gradients> grads, const py::object& second, const char* argument,
       bool is_difference);
  static HostReader reader() { return {false, {.may_require_grad = true}}; }
  void check_entry(std::size_t i) const;

  std::shared_ptr<const Gradients> grads_, second_;
  bool is_difference_;
  double l2_ = 0.0, l1_ = 0.0;
};

}  // namespace gradclip::bindings
