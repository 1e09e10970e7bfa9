// SPDX-License-Identifier: Apache-2.0
#include <string>
#include <string_view>

#include <cerrno>

#include "block/crypto/base64.h"
#include "block/crypto/secret.h"
#include "block/crypto/utf8.h"
#include "graph_fixture.h"
#include "temp_directory.h"

namespace minivmm::block::crypto {
namespace {

std::string text_of(const SecureBytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

TEST(CryptoSecret, ComesFromDataFileAndBase64) {
  const TempDirectory files;
  SecretStore store;
  store.add_object("secret,id=a,data=with a,, comma");
  store.add_object("secret,id=b,format=base64,data=aGVsbG8=");
  // All bytes of the file, as QEMU: also a line end.
  store.add_object("qom-type=secret,id=c,file=" + files.write("c", "line\n"));
  store.add_object("secret,id=d,format=base64,file=" + files.write("d", "aGVs\nbG8=\n"));
  store.add_object(R"({"qom-type": "secret", "id": "e", "data": "json"})");
  EXPECT_EQ(text_of(store.get("a")), "with a, comma");
  EXPECT_EQ(text_of(store.get("b")), "hello");
  EXPECT_EQ(text_of(store.get("c")), "line\n");
  EXPECT_EQ(text_of(store.get("d")), "hello");
  EXPECT_EQ(text_of(store.get("e")), "json");
}

TEST(CryptoSecret, MayBeEncryptedWithAnother) {
  SecretStore store;
  // openssl enc -aes-256-cbc -a -K 000102..1f -iv 00..0f of "letmein".
  store.add_object(
      "secret,id=master,format=base64,data=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
  store.add_object(
      "secret,id=a,format=base64,keyid=master,iv=AAECAwQFBgcICQoLDA0ODw==,data="
      "SI4JuWqmJF8bjD9IJ662eg==");
  EXPECT_EQ(text_of(store.get("a")), "letmein");
  // Another key: the padding is wrong nearly always, and for this one surely.
  store.add_object(
      "secret,id=other,format=base64,data=AQECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
  EXPECT_NE(error_text([&] {
              store.add_object(
                  "secret,id=b,format=base64,keyid=other,iv=AAECAwQFBgcICQoLDA0ODw==,"
                  "data=SI4JuWqmJF8bjD9IJ662eg==");
            }).find("padding"),
            std::string::npos);
}

TEST(CryptoSecret, WhatIsWrongIsSaid) {
  const TempDirectory files;
  SecretStore store;
  const auto error = [&](const std::string& text) {
    return error_text([&] { store.add_object(text); });
  };
  EXPECT_NE(error("secret,data=x").find("'id'"), std::string::npos);
  EXPECT_NE(error("secret,id=x").find("Either 'file' or 'data'"), std::string::npos);
  EXPECT_NE(error("secret,id=x,data=a,file=b").find("mutually exclusive"), std::string::npos);
  EXPECT_NE(error("secret,id=x,data=a,color=red").find("'color'"), std::string::npos);
  EXPECT_NE(error("secret,id=x,format=base64,data=a").find("not base64"), std::string::npos);
  EXPECT_NE(error("secret,id=x,file=" + (files / "missing")).find("missing"), std::string::npos);
  EXPECT_NE(error("secret,id=x,keyid=none,iv=AAAA,data=a").find("'none'"), std::string::npos);
  EXPECT_NE(error("tls-creds-psk,id=x").find("'tls-creds-psk'"), std::string::npos);
  EXPECT_NE(error("secret,id=x,file=/dev/zero").find("more than"), std::string::npos);
  EXPECT_FALSE(store.has("x"));
  store.add_object("secret,id=x,data=a");
  EXPECT_EQ(error_number([&] { store.add_object("secret,id=x,data=b"); }), EEXIST);
  EXPECT_EQ(error_number([&] { store.get("y"); }), ENOENT);
  EXPECT_EQ(text_of(store.get("x")), "a");
}

TEST(CryptoSecret, Base64IsStrict) {
  EXPECT_EQ(text_of(*decode_base64("")), "");
  EXPECT_EQ(text_of(*decode_base64("Zg==")), "f");
  EXPECT_EQ(text_of(*decode_base64("Zm8=")), "fo");
  EXPECT_EQ(text_of(*decode_base64("Zm9v")), "foo");
  EXPECT_EQ(text_of(*decode_base64("Zm9vYmE=")), "fooba");
  for (const char* wrong : {"Zg", "Zg=", "Z===", "Zg==Zg==", "Zm 9v", "Zm9v!", "=Zm9"}) {
    EXPECT_FALSE(decode_base64(wrong)) << wrong;
  }
}

TEST(CryptoSecret, Utf8IsRecognised) {
  const auto check = [](std::string_view text) {
    return is_utf8(std::as_bytes(std::span(text.data(), text.size())));
  };
  EXPECT_TRUE(check(""));
  EXPECT_TRUE(check("plain"));
  EXPECT_TRUE(check("\u00e4\u20ac\U0001f511"));
  for (const std::string_view wrong :
       {std::string_view("\0", 1), std::string_view("\x80"), std::string_view("\xc3"),
        std::string_view("\xc0\xaf"), std::string_view("\xe0\x80\x80"),
        std::string_view("\xed\xa0\x80"), std::string_view("\xf4\x90\x80\x80"),
        std::string_view("\xff")}) {
    EXPECT_FALSE(check(wrong));
  }
}

}  // namespace
}  // namespace minivmm::block::crypto
