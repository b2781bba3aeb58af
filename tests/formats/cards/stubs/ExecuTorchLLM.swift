// Signatures of ExecuTorchLLM as Swift imports its Objective-C headers (1.4.1 to 1.5), for what cards call.

public class Config {
    public var isEchoEnabled = true
    public var maximumNewTokens = -1
    public var sequenceLength = -1
    public var temperature = 0.8
    public var bosCount = 0

    public init(_ block: (Config) -> Void) {}
}

public class TextRunner {
    public init(modelPath: String, tokenizerPath: String) {}

    public func load() throws {}

    public func generate(_ prompt: String, _ config: Config, tokenCallback callback: ((String) -> Void)?) throws {}

    public func stop() {}

    public func reset() {}
}
