// `narrows inspect`: the shapes of the file, and cache sizes that agree with a real cache and with
// arithmetic.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "cli/program.h"
#include "support/tiny_model.h"

namespace narrows {
namespace {

using testing::Finished;
using testing::run;
using testing::TempDir;
using Json = nlohmann::json;

Json inspect(std::vector<std::string> more) {
  more.insert(more.begin(), {"inspect", "-m", testing::model_path(), "--json", "--threads", "1"});
  const Finished finished = run(more);
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  return Json::parse(finished.out, nullptr, false);
}

TEST(Inspect, ShapesAndCacheSizes) {
  const Json document = inspect({"--context", "4096"});
  EXPECT_EQ(document["model"]["architecture"], "llama");
  EXPECT_EQ(document["model"]["n_layer"], 30);
  EXPECT_EQ(document["model"]["n_head_kv"], 3);
  EXPECT_EQ(document["model"]["head_dim"], 64);
  EXPECT_EQ(document["model"]["n_ctx_train"], 8192);
  ASSERT_EQ(document["cache"].size(), 7U);
  EXPECT_EQ(document["cache"][0]["kv"], "f16");
  // 30 layers, keys and values, 3 heads of 64, 2 bytes; pages may round it up.
  EXPECT_NEAR(document["cache"][0]["bytes_per_token"].get<double>(), 30 * 2 * 3 * 64 * 2, 300);
  for (const Json& size : document["cache"]) {
    EXPECT_NEAR(size["bytes"].get<double>() / 4096, size["bytes_per_token"].get<double>(), 0.01);
    EXPECT_LE(size["bytes"], document["cache"][0]["bytes"]);
  }
  EXPECT_TRUE(document["key_spectrum"].empty());
}

TEST(Inspect, KindsOfLayers) {
  const TempDir dir;
  testing::TinyModel hybrid;
  hybrid.architecture = "qwen35";
  hybrid.n_layer = 4;
  hybrid.attends_in = 4;
  const std::string path = hybrid.write(dir.path("hybrid.gguf"));
  const Json model = Json::parse(run({"inspect", "-m", path, "--json"}).out, nullptr, false)["model"];
  EXPECT_EQ(model["n_layer_recurrent"], 3);
  EXPECT_EQ(model["n_layer_windowed"], 0);
  // Four rows of 128 channels and four heads of 16 x 16, float32, in each.
  EXPECT_EQ(model["recurrent_bytes"], 3 * 4 * (4 * 128 + 4 * 16 * 16));
  const Finished text = run({"inspect", "-m", path});
  EXPECT_NE(text.out.find("3 of gated DeltaNet"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("1 attend to all"), std::string::npos) << text.out;
  const Finished spectrum = run({"inspect", "-m", path, "-f", dir.file("a.txt", std::string(900, 'a'))});
  EXPECT_NE(spectrum.exit_code, 0);
  EXPECT_NE(spectrum.err.find("recurrent layers"), std::string::npos) << spectrum.err;

  testing::TinyModel windows;
  windows.architecture = "gemma3";
  windows.n_layer = 4;
  windows.window = 24;
  windows.window_period = 3;
  const Finished windowed = run({"inspect", "-m", windows.write(dir.path("windows.gguf"))});
  EXPECT_NE(windowed.out.find("3 attend to a window"), std::string::npos) << windowed.out;
  EXPECT_EQ(run({"inspect", "-m", testing::model_path()}).out.find("\nlayers "), std::string::npos);
}

TEST(Inspect, DefaultContextIsThatOfTheModel) {
  EXPECT_EQ(inspect({})["context"], 8192);
  const Finished text = run({"inspect", "-m", testing::model_path()});
  EXPECT_NE(text.out.find("-f FILE"), std::string::npos);  // says how to get the spectrum
}

TEST(Inspect, SpectrumFallsInEveryLayer) {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 40; ++i)
    text += "Line " + std::to_string(i) + ": the fox jumps over " + std::to_string(i * i) + " dogs.\n";
  const Json spectrum = inspect({"-f", dir.file("a.txt", text)})["key_spectrum"];
  ASSERT_EQ(spectrum.size(), 30U);
  for (const Json& layer : spectrum) {
    EXPECT_GT(layer["share_8th"], 0.125);  // more than coordinates of equal strength would have
    EXPECT_LT(layer["share_8th"], layer["share_4th"]);
    EXPECT_LT(layer["share_4th"], layer["share_half"]);
    EXPECT_LE(layer["share_half"], 1.0 + 1e-9);
  }
}

}  // namespace
}  // namespace narrows
