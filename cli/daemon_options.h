// SPDX-License-Identifier: Apache-2.0
// The options that `boot` and `serve` share, and their way into a control::Config.
#pragma once

#include <string>

#include <cstdint>
#include <vector>

#include <boost/program_options.hpp>

#include "control/config.h"

namespace minivmm::cli {

boost::program_options::options_description graph_options();
boost::program_options::options_description front_end_options();
boost::program_options::options_description process_options();

// Parses; prints `usage` and the options and returns false for --help. Throws UsageError.
bool parse(const std::vector<std::string>& arguments, const std::string& usage,
           const boost::program_options::options_description& options,
           boost::program_options::variables_map& values);

// The number of an option that the table holds as text. Throws base::Error naming it and what it
// may be: Boost would take -1 for 4294967295.
uint64_t number_value(const boost::program_options::variables_map& values, const std::string& name,
                      uint64_t min, uint64_t max);

// The same for a text.
uint64_t parse_number(const std::string& name, const std::string& text, uint64_t min, uint64_t max);

// Throws base::Error that names the option.
control::Config make_config(const boost::program_options::variables_map& values);

}  // namespace minivmm::cli
