# cmake -DOUT=chat_page.cpp -DWEB=web -P embed.cmake: the page's files as functions of chat_page.h.
set(code "// Made by embed.cmake out of web/.\n#include \"server/chat_page.h\"\n\nnamespace narrows::server::chat_page {\n")
foreach(pair IN ITEMS html=index.html js=chat.js markdown=markdown.js store=store.js css=chat.css)
  string(REPLACE "=" ";" pair "${pair}")
  list(GET pair 0 name)
  list(GET pair 1 file)
  file(READ "${WEB}/${file}" hex HEX)
  string(REGEX REPLACE "(..)" "'\\\\x\\1'," bytes "${hex}")
  string(REGEX REPLACE "((................){16})" "\\1\n" bytes "${bytes}") # lines of no more than an editor bears
  string(APPEND code "\nnamespace {\nconstexpr char k_${name}[] = {${bytes}};\n}\nstd::string_view ${name}() { return {k_${name}, sizeof(k_${name})}; }\n")
endforeach()
string(APPEND code "\n}  // namespace narrows::server::chat_page\n")
file(WRITE "${OUT}" "${code}")
