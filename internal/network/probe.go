package network

import "github.com/miekg/dns"

// ProbeName is a name the forwarder answers by itself, without data, so that a guest can tell whether its gateway
// answers by UDP and by TCP, whatever state the resolvers are in. The domain is reserved for private use (ICANN, 2024).
const ProbeName = "probe.flint.internal"

// probed answers a query for ProbeName.
func probed(q *dns.Msg) *dns.Msg { return refusal(q, dns.RcodeSuccess) }
