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
  // What is asked for: gradients + l2 * params + l1 * sign(params); or the update of base that they are.
  struct Terms {
    double l2 = 0.0, l1 = 0.0;
    bool is_difference = false;

    static Terms of_params(const py::object& l2, const py::object& l1);
    static Terms of_base() { return {.is_difference = true}; }
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
  bool is_difference() const { return terms_.is_difference; }
  // What is made where gradients hold grad_scale times what they are; with the `rows` of gradients, a part for each
  // of them. To be called when all has been rechecked: by shapes as they are now.
  PairTable table(double grad_scale, const RowTable* rows) const;
  // As of Gradients, and that no gradient lies where a second array does.
  void require_writable() const;

 private:
  const char* argument() const { return terms_.is_difference ? "base" : "params"; }
  py::object in_order(const py::object& second) const;
  void check_entries() const;
  void check_entry(std::size_t i) const;

  std::shared_ptr<const Gradients> grads_;
  Terms terms_;
  Gradients second_;
};

// Of gradients on the CPU.
inline HostReader second_reader() { return {false, {.may_require_grad = true}}; }

}  // namespace gradclip::bindings
