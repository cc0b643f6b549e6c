// What is said where there is no GPU to work on, and which words `--device` takes.
#include "device/library.h"

#include <gtest/gtest.h>

#include <fstream>

#include "device/device.h"
#include "device/host_device.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

using device::Choice;

std::string sentence_of(const std::function<void(HostDevice&)>& change, int index = 0) {
  const WithHostDevice with;
  change(host_device());
  device::Info info{};
  const Status s = device::check_card(host_api(), index, &info);
  EXPECT_EQ(s.code(), s.ok() ? StatusCode::ok : StatusCode::unsupported);
  return s.message();
}

TEST(DeviceChoice, TakesFourForms) {
  EXPECT_EQ(device::parse_choice("cpu")->kind, Choice::Kind::cpu);
  EXPECT_EQ(device::parse_choice("auto")->kind, Choice::Kind::automatic);
  EXPECT_EQ(device::parse_choice("cuda")->index, 0);
  EXPECT_EQ(device::parse_choice("cuda:3")->index, 3);
  for (const char* text : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "CUDA"}) {
    EXPECT_EQ(device::parse_choice(text).status().code(), StatusCode::invalid_argument) << text;
  }
}

TEST(DeviceCard, SaysWhyItCannotBeUsed) {
  EXPECT_EQ(sentence_of([](HostDevice&) {}), "");
  EXPECT_NE(sentence_of([](HostDevice& d) { d.driver = 0; }).find("there is no NVIDIA driver"),
            std::string::npos);
  EXPECT_NE(sentence_of([](HostDevice& d) {
              d.driver = 12040;
            }).find("too old: it knows CUDA 12.4, and 13.0 is needed"),
            std::string::npos);
  EXPECT_NE(sentence_of([](HostDevice& d) { d.n_card = 0; }).find("finds no GPU"), std::string::npos);
  EXPECT_NE(sentence_of([](HostDevice&) {}, 2).find("there is no GPU 2: the driver finds 1"),
            std::string::npos);
  EXPECT_NE(
      sentence_of([](HostDevice& d) { d.major = 7; }).find("compute capability is 7.0, and 8.0 is the least"),
      std::string::npos);
}

TEST(DeviceLibrary, AFileThatIsNoneIsRefusedByName) {
  const TempDir dir;
  const std::string path = dir.path("libnarrows_cuda.so");
  EXPECT_EQ(device::load_library(path).status().code(), StatusCode::unsupported);
  std::ofstream(path) << "not a library";
  const Status s = device::load_library(path).status();
  EXPECT_EQ(s.code(), StatusCode::unsupported);
  EXPECT_NE(s.message().find(path), std::string::npos) << s.message();
}

TEST(Device, AFullCardIsRefusedWithBothFigures) {
  const WithHostDevice with;
  host_device().total_bytes = 3'000'000'000;
  const auto card = device::Device::open(host_api(), 0);
  ASSERT_TRUE(card.ok());
  const Status s = (*card)->allocate(5'000'000'000, "a test").status();
  EXPECT_EQ(s.code(), StatusCode::out_of_memory);
  EXPECT_NE(s.message().find("5.00 GB are needed and 3.00 GB are free"), std::string::npos) << s.message();
}

}  // namespace
}  // namespace narrows::testing
