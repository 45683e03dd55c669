#include "stand_ins.h"

#include "numbers.h"

namespace edgemoe {

int StandIns::expert_tensor(const ggml::Tensor* tensor) const {
    const auto found = experts_.find(tensor);
    return found == experts_.end() ? buffer_.expert_tensor(tensor) : found->second;
}

StandIns::StandIn& StandIns::of(int id, const ggml::Tensor* experts) {
    std::unique_ptr<StandIn>& its = by_id_[id];
    if (!its) {
        const SlotView view = store_.slots_of(id);
        its = std::make_unique<StandIn>();
        its->experts = *experts;
        its->experts.data = view.first;
        its->experts.nb[2] = view.stride;
        experts_.emplace(&its->experts, id);
    }
    return *its;
}

void StandIns::put_in(ggml::Tensor* node, int id) {
    if (!store_.in_slots()) {
        return;
    }
    StandIn& its = of(id, node->src[0]);
    if (node->src[2] != &its.ids) {
        its.selected = node->src[2];
    }
    read_numbers(its.selected, its.slots);
    for (int32_t& number : its.slots) {
        number = store_.slot(store_.tensor(id).layer, number);
    }
    // MUL_MAT_ID takes memory for each slot that there is.
    its.experts.ne[2] = store_.slots_of(id).n_slots;
    its.experts.nb[3] = its.experts.nb[2] * static_cast<size_t>(its.experts.ne[2]);
    its.ids = *its.selected;
    its.ids.view_src = nullptr;
    its.ids.nb[0] = sizeof(int32_t);
    its.ids.nb[1] = its.ids.nb[0] * static_cast<size_t>(its.ids.ne[0]);
    its.ids.nb[2] = its.ids.nb[3] = its.ids.nb[1] * static_cast<size_t>(its.ids.ne[1]);
    its.ids.data = its.slots.data();
    node->src[0] = &its.experts;
    node->src[2] = &its.ids;
}

}  // namespace edgemoe
