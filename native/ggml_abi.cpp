#include "ggml_abi.h"

#include <array>
#include <cstring>

namespace edgemoe::ggml {

namespace {

constexpr std::array<float, 2> kTwo{3, 4};

void not_called(Tensor*, int, int, void*) {}

}  // namespace

std::string Api::check_layout() {
    constexpr int kF32 = 0;
    constexpr int kI32 = 26;
    Context* context = init({16 * 1024, nullptr, true});
    if (context == nullptr) {
        return "ggml_init failed";
    }
    std::string wrong;
    Tensor* experts = new_tensor_3d(context, kF32, 8, 6, 4);
    Tensor* input = new_tensor_3d(context, kF32, 8, 2, 3);
    Tensor* ids = new_tensor_3d(context, kI32, 2, 3, 1);
    Tensor* product = mul_mat_id(context, experts, input, ids);
    Tensor* rows = get_rows(context, input, ids);
    Tensor* custom = custom_4d(context, kF32, 6, 2, 3, 1, &experts, 1, not_called, kAllThreads, &wrong);
    set_name(experts, "layout check");
    CustomOp op{};
    std::memcpy(&op, custom->op_params, sizeof(op));

    const auto expect = [&wrong](bool good, const char* field) {
        if (!good) {
            wrong += wrong.empty() ? field : std::string(", ") + field;
        }
    };
    expect(experts->type == kF32 && ids->type == kI32, "type");
    expect(experts->ne[0] == 8 && experts->ne[1] == 6 && experts->ne[2] == 4 && experts->ne[3] == 1, "ne");
    expect(experts->nb[0] == 4 && experts->nb[1] == 32 && experts->nb[2] == 192 && experts->nb[3] == 768, "nb");
    expect(nbytes(experts) == 768, "ggml_nbytes");
    expect(std::strcmp(experts->name, "layout check") == 0, "name");
    expect(experts->data == nullptr && experts->buffer == nullptr && experts->view_src == nullptr, "data");
    expect(product->src[0] == experts && product->src[1] == input && product->src[2] == ids, "src");
    expect(product->op != experts->op && product->op > 0, "op");
    expect(rows->src[0] == input && rows->src[1] == ids && rows->op != product->op && rows->op > 0, "rows");
    expect(custom->src[0] == experts && custom->op != product->op && custom->op > 0, "custom");
    expect(op.fun == not_called && op.n_tasks == kAllThreads && op.userdata == &wrong, "op_params");
    expect(row_size(kF32, 8) == experts->nb[1], "ggml_row_size");
    const TypeTraits* traits = type_traits(kF32);
    float product_of_two = 0;
    traits->vec_dot(2, &product_of_two, 0, kTwo.data(), 0, kTwo.data(), 0, 1);
    expect(traits->vec_dot_type == kF32 && product_of_two == 25, "type traits");
    op_none = experts->op;
    op_mul_mat_id = product->op;
    op_get_rows = rows->op;
    op_custom = custom->op;
    free(context);
    return wrong;
}

}  // namespace edgemoe::ggml
