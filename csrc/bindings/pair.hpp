// Gradients and a second list of arrays, one for each: parameters, what an update began from, or what is added.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/gradients.hpp"
#include "core/pair.hpp"
#include "cpu/engine.hpp"

namespace gradclip::bindings {

class Pair {
 public:
  // What is asked for: gradients + l2 * params + l1 * sign(params); the update of base that they are; or accumulators
  // + scale * grads, where a second array may be missing.
  struct Terms {
    enum Kind { regularisation, difference, accumulation } kind = regularisation;
    double l2 = 0.0, l1 = 0.0, scale = 1.0;

    static Terms of_params(const py::object& l2, const py::object& l1);
    static Terms of_base() { return {.kind = difference}; }
    static Terms of_scale(const py::object& scale);
  };
  // Readers of the gradients, and of the second list, which may have tensors that require grad.
  template <class First, class Second>
  Pair(std::shared_ptr<const Gradients> grads, const py::object& second, const Terms& terms,
       First&& first_reader, Second&& second_reader)
      : grads_(std::move(grads)),
        terms_(terms),
        second_(in_order(second), second_reader, argument(), grads_->names()) {
    grads_->require_unchanged(first_reader);  // code of the second list's may have run
    check_entries();
  }

  const std::shared_ptr<const Gradients>& gradients() const { return grads_; }
  const Gradients& second() const { return second_; }
  bool is_difference() const { return terms_.kind == Terms::difference; }
  // What is made where gradients hold grad_scale times what they are; with the `rows` of gradients, a part for each
  // of them. To be called when all has been rechecked: by shapes as they are now.
  PairTable table(double grad_scale, const RowTable* rows) const;
  // Whether what is made of the gradients is other than they are.
  bool adds_something() const { return terms_.scale != 0.0; }
  // As of Gradients, and that no gradient lies where a second array does.
  void require_writable() const;

 private:
  const char* argument() const {
    return is_difference() ? "base" : is_accumulation() ? "grads" : "params";
  }
  bool is_accumulation() const { return terms_.kind == Terms::accumulation; }
  PairFormula formula(double grad_scale) const;
  py::object in_order(const py::object& second) const;
  void check_entries() const;
  void check_entry(std::size_t i) const;
  void check_accumulators() const;

  std::shared_ptr<const Gradients> grads_;
  Terms terms_;
  Gradients second_;
};

// Of gradients on the CPU.
inline HostReader second_reader() { return {false, {.may_require_grad = true}}; }

}  // namespace gradclip::bindings
