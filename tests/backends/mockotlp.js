// Runs @elastic/mockotlpserver on a port of its own (its command line knows only 4318) and writes what it receives to
// standard output, one JSON object per line: {"request": …}, {"export": …}, {"fault": …}.
'use strict';

const {MockOtlpServer} = require('@elastic/mockotlpserver');

const IDS = new Set(['traceId', 'spanId', 'parentSpanId']);

// protobufjs hands bytes over as Buffers; OTLP JSON wants ids in hex and other bytes in base64.
function plain(key, value) {
    if (value && value.type === 'Buffer') {
        return Buffer.from(value.data).toString(IDS.has(key) ? 'hex' : 'base64');
    }
    return value;
}

function say(what, value) {
    process.stdout.write(JSON.stringify({[what]: value}, plain) + '\n');
}

function received(message) {
    const {toObject} = message.constructor;
    say('export', toObject ? toObject(message, {longs: String, json: true}) : message);
}

// The server answers 200 before it parses; a body it cannot parse would end the process.
process.on('uncaughtException', (error) => say('fault', String(error)));

new MockOtlpServer({
    logLevel: 'error',
    services: ['http'],
    httpHostname: '127.0.0.1',
    httpPort: Number(process.argv[2]),
    onRequest: (request) => say('request', request),
    onTrace: received,
    onMetrics: received,
    onLogs: received,
}).start().catch((error) => {
    say('fault', String(error));
    process.exit(1);
});
