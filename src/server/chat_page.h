// The files of web/, built in.
#pragma once

#include <string_view>

namespace narrows::server::chat_page {

std::string_view html();
std::string_view js();
std::string_view markdown();
std::string_view store();
std::string_view css();

}  // namespace narrows::server::chat_page
