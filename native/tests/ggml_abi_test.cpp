#include "ggml_abi.h"

#include "fake_ggml.h"

using edgemoe::ggml::Api;

TEST(right_layout_is_accepted_and_the_operations_learnt) {
    Api api = fake_ggml::make_api();
    CHECK_EQUAL(api.op_mul_mat_id, -1);
    CHECK_EQUAL(api.check_layout(), "");
    CHECK_EQUAL(api.op_mul_mat_id, fake_ggml::kOpMulMatId);
    CHECK_EQUAL(api.op_get_rows, fake_ggml::kOpGetRows);
    CHECK_EQUAL(api.op_custom, fake_ggml::kOpCustom);
    CHECK(fake_ggml::open_context() == nullptr);  // freed
}

TEST(another_layout_is_named) {
    Api api = fake_ggml::make_api();
    api.nbytes = [](const edgemoe::ggml::Tensor*) { return size_t{1}; };
    CHECK_EQUAL(api.check_layout(), "ggml_nbytes");

    api = fake_ggml::make_api();
    api.set_name = [](edgemoe::ggml::Tensor* tensor, const char* name) {
        fake_ggml::set_name(tensor, std::string("x") + name);
        return tensor;
    };
    CHECK_EQUAL(api.check_layout(), "name");

    api = fake_ggml::make_api();
    api.new_tensor_3d = [](edgemoe::ggml::Context*, int type, int64_t ne0, int64_t ne1, int64_t ne2) {
        edgemoe::ggml::Tensor tensor = fake_ggml::make_tensor(type + 1, "", {ne1, ne0, ne2});
        tensor.view_src = &fake_ggml::open_context()->emplace_back(tensor);
        return &fake_ggml::open_context()->emplace_back(tensor);
    };
    CHECK_EQUAL(api.check_layout(), "type, ne, nb, data, ggml_row_size");

    api = fake_ggml::make_api();
    api.mul_mat_id = [](edgemoe::ggml::Context*, edgemoe::ggml::Tensor* as, edgemoe::ggml::Tensor*,
                        edgemoe::ggml::Tensor*) { return as; };
    CHECK_EQUAL(api.check_layout(), "src, op");

    api = fake_ggml::make_api();
    api.type_traits = [](int) { return fake_ggml::type_traits(fake_ggml::kI8); };
    CHECK_EQUAL(api.check_layout(), "type traits");

    api = fake_ggml::make_api();
    api.custom_4d = [](edgemoe::ggml::Context*, int type, int64_t, int64_t, int64_t, int64_t,
                       edgemoe::ggml::Tensor** args, int, decltype(edgemoe::ggml::CustomOp::fun), int, void*) {
        edgemoe::ggml::Tensor other = fake_ggml::make_tensor(type, "", {1});
        other.op = fake_ggml::kOpCustom;
        other.src[0] = args[0];
        return &fake_ggml::open_context()->emplace_back(other);
    };
    CHECK_EQUAL(api.check_layout(), "op_params");
}

TEST(no_context_is_said) {
    Api api = fake_ggml::make_api();
    api.init = [](edgemoe::ggml::InitParams) -> edgemoe::ggml::Context* { return nullptr; };
    CHECK_EQUAL(api.check_layout(), "ggml_init failed");
}
