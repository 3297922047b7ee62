// The types of destinations: what each is for, its fields, and where to find their values.

const HEADERS = {
  key: "headers", kind: "headers", label: "Further headers",
  help: "Sent with every delivery, for instance for authentication; a JSON object can be pasted. Values are kept secret: they come back masked.",
};

export const TYPES = [
  {
    type: "otel-collector", title: "OpenTelemetry Collector",
    what: "Any receiver of OTLP over HTTP that takes JSON: a Collector, SigNoz, Uptrace, OpenObserve, Langfuse.",
    fields: [
      { key: "endpoint", kind: "url", label: "Endpoint", required: true, placeholder: "http://localhost:4318/v1/traces",
        help: "Used exactly as it stands. The Collector's otlp receiver listens on port 4318 for HTTP, and takes traces at /v1/traces." },
      HEADERS,
    ],
  },
  {
    type: "grafana", title: "Grafana Cloud", what: "Traces in Grafana Cloud's hosted Tempo.",
    fields: [
      { key: "base_url", kind: "url", label: "OTLP gateway", placeholder: "https://otlp-gateway-prod-us-west-0.grafana.net",
        help: "grafana.com, your stack, OpenTelemetry, Configure: the OTLP endpoint. Not the address of your Grafana. Any of the forms shown there works." },
      { key: "instance_id", label: "Instance ID", required: true, placeholder: "123456", digits: true,
        help: "On the same page: a number. It is the user name of the gateway, not the name of the stack." },
      { key: "api_key", label: "Access policy token", required: true, secret: true, placeholder: "glc_…",
        help: "On the same page: generate a token. It begins with glc_ and needs the right traces:write." },
      HEADERS,
    ],
  },
  {
    type: "axiom", title: "Axiom", what: "Traces in an Axiom data set.",
    fields: [
      { key: "token", label: "API token", required: true, secret: true, placeholder: "xaat-…",
        help: "Axiom, Settings, API tokens: one that may ingest into this data set." },
      { key: "dataset", label: "Data set", required: true, placeholder: "llm-traces", help: "Axiom, Datasets: its exact name; it must exist." },
      { key: "endpoint", kind: "url", label: "Endpoint of another region", placeholder: "https://api.axiom.co/v1/traces",
        help: "Only where your organisation is not in the default region." },
      HEADERS,
    ],
  },
  {
    type: "jaeger", title: "Jaeger", what: "A Jaeger that you run.",
    fields: [
      { key: "base_url", kind: "url", label: "Address", required: true, placeholder: "http://localhost:4318",
        help: "Where Jaeger takes OTLP over HTTP: port 4318. Port 16686 is its web page. /v1/traces is added." },
      { key: "tenant", label: "Tenant", placeholder: "team-a", help: "Only with multi-tenancy: goes into the header x-tenant." },
      HEADERS,
    ],
  },
  {
    type: "tempo", title: "Grafana Tempo", what: "A Tempo that you run.",
    fields: [
      { key: "base_url", kind: "url", label: "Address", required: true, placeholder: "http://localhost:4318",
        help: "The distributor's OTLP receiver for HTTP, port 4318. Port 3200 is for queries. /v1/traces is added." },
      { key: "tenant", label: "Tenant", placeholder: "team-a", help: "Needed where multitenancy_enabled is set: goes into X-Scope-OrgID." },
      HEADERS,
    ],
  },
  {
    type: "honeycomb", title: "Honeycomb", what: "Traces in a Honeycomb environment.",
    fields: [
      { key: "api_key", label: "Ingest key", required: true, secret: true, placeholder: "hcaik_…",
        help: "Honeycomb, Environment settings, API keys: an ingest key that may send events." },
      { key: "dataset", label: "Data set", placeholder: "llm", help: "Only for Honeycomb Classic; elsewhere the service's name decides." },
      { key: "endpoint", kind: "url", label: "Endpoint of another region", placeholder: "https://api.eu1.honeycomb.io/v1/traces",
        help: "For the EU: api.eu1.honeycomb.io. Empty: the United States." },
      HEADERS,
    ],
  },
  {
    type: "lightstep", title: "Lightstep", what: "ServiceNow Cloud Observability, formerly Lightstep.",
    fields: [
      { key: "access_token", label: "Access token", required: true, secret: true, placeholder: "token",
        help: "Settings, Access tokens: one of the project that shall have the traces." },
      { key: "endpoint", kind: "url", label: "Endpoint of another region", placeholder: "https://ingest.lightstep.com/v1/traces",
        help: "Empty: the United States. For the EU: ingest.eu.lightstep.com." },
      HEADERS,
    ],
  },
  {
    type: "webhook", title: "Webhook", what: "Your own service; gets each batch as OTLP JSON.",
    fields: [
      { key: "url", kind: "url", label: "URL", required: true, placeholder: "https://example.com/hooks/llm",
        help: "Called with every batch; any 2xx is success. The connection test carries the header X-Test-Connection: true." },
      { key: "method", label: "Method", options: ["POST", "PUT"], help: "How it wants to be called." },
      HEADERS,
    ],
  },
  {
    type: "file", title: "File", what: "One OTLP JSON request per line, for sites without a network.",
    fields: [{ key: "path", label: "Path" }],
    only: "Made in config.toml only: a [[broadcast.destinations]] table with type = \"file\" and path. Send it later with router.py replay.",
  },
];

export const typeOf = (type) => TYPES.find((known) => known.type === type) ?? { type, title: type, what: "", fields: [] };
